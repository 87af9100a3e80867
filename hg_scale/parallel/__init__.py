"""Many processes: who is who, and how the model is distributed over them.

launch -> mesh -> megatron                    (ranks, the axes, tensor parallelism)
pipeline_cut -> pipeline                      (where a pipeline is cut; the module of a stage)
deepspeed_adapter                             (all private state of DeepSpeed)
timeouts, runtime_errors, extensions          (collectives that wait, fail, or have to be compiled)
memory, doctor                                (state per rank; whether a machine is fit to train)
"""
