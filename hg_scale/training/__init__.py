"""Training a model: from a checked configuration to the last checkpoint of the run folder.

run -> resume, engine                            (build the engine, restore the newest checkpoint)
run -> loop -> batch_loader, engine -> guard     (one optimizer step)
loop -> validation, checkpointer -> state        (what happens between steps)
loop -> run_log -> metrics, console, wandb_log   (what is logged)
interruption, failures, agreement                (how a run stops, on all ranks together)
check, dry_run                                   (before a run; neither imports torch)
monitoring                                       (stalled and slow ranks, `hg-scale status`)
"""
