"""DeepSpeed's own configuration: generated, never written by hand."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from hg_scale.config.errors import Problem
from hg_scale.config.schema import Config

# DeepSpeed ignores top-level keys that it does not know, so they are known here (0.19).
_KEYS = """
    activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comms_logger
    communication_data_type compile compression_training csv_monitor data_efficiency data_types
    disable_allgather dump_state eigenvalue elasticity flops_profiler fp16 fp8
    gradient_accumulation_steps gradient_clipping gradient_predivide_factor
    graph_harvesting hybrid_engine memory_breakdown monitor_config nebula optimizer pipeline
    prescale_gradients progressive_layer_drop scheduler seq_parallel_communication_data_type
    sparse_attention sparse_gradients steps_per_print tensor_parallel tensorboard timers
    torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism wall_clock_breakdown wandb weight_quantization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization"""
EXPERT_KEYS = frozenset(_KEYS.split())
# Inside these objects it refuses unknown keys, but only once the processes are up.
_NESTED = {
    "bf16": """bf16_master_weights_and_grads bf16_optimizer_states check_grad_overflow enabled
        immediate_grad_update""",
    "zero_optimization": """
        allgather_bucket_size allgather_partitions compute_grad_norm
        contiguous_gradients cpu_offload cpu_offload_param cpu_offload_use_pin_memory
        elastic_checkpoint enable_sanity_checks ignore_unused_parameters leaf_module legacy_stage1
        load_from_fp32_weights log_trace_cache_warnings memory_efficient_linear
        offload_optimizer offload_param overlap_comm override_module_apply parameter_alignment
        pipeline_loading_checkpoint reduce_bucket_size reduce_scatter round_robin_gradients
        save_muon_momentum_buffer_in_memory stage
        stage3_allgather_sequential
        stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
        stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold
        stage3_module_granularity_threshold stage3_param_persistence_threshold
        stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params
        sub_group_size use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size
        zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights""",
}
NESTED_KEYS = {key: frozenset(names.split()) for key, names in _NESTED.items()}
# Ours to set: what replaces each of them.
_OURS = {
    "optimizer": "the section optimizer",
    "scheduler": "the section schedule",
    "fp16": "training.precision",
    "amp": "training.precision",
    "bfloat16": "training.precision",
    "torch_autocast": "training.precision",
    "tensor_parallel": "parallel.tensor",
    "activation_checkpointing": "training.activation_checkpointing",
    "wandb": "logging.wandb_project",
    "elasticity": "training.global_batch_size",
    "sparse_attention": "model.window",
    "train_batch_size": "training.global_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
}


def generated(config: Config, micro_batches: int) -> dict[str, Any]:
    """The part of DeepSpeed's configuration that follows from ours.

    `micro_batches` is the number of micro-batches an optimizer step on each data-parallel rank.
    """
    bf16, stage = config.training.precision == "bf16", config.parallel.zero_stage
    clip = config.optimizer.gradient_clipping
    if stage == 0 and clip == 0:
        clip = 1e30  # never clips; DeepSpeed measures no gradient norm there without it
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": clip,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 1_000_000_000,  # our own log says more
        "zero_allow_untested_optimizer": True,  # torch's Adam, which it does not list
    }
    if bf16:
        # Micro-batches are added up in fp32: sums of bf16 would lose most of the later ones. Under
        # stage 1 every rank holds that sum whole (4 bytes a parameter), under 2 and 3 its share.
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


def deepspeed_config(config: Config, micro_batches: int) -> dict[str, Any]:
    """What `deepspeed.initialize` gets: the generated part and the expert keys beside it."""
    return _merge(generated(config, micro_batches), config.deepspeed)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = _merge(old, value) if both else value  # type: ignore[arg-type]
    return result


def deepspeed_problems(config: Config) -> Iterator[Problem]:
    """Expert keys that DeepSpeed does not know, or that contradict the generated ones."""
    fixed = generated(config, 1)
    for key, value in config.deepspeed.items():
        path = f"deepspeed.{key}"
        if key in _OURS:
            yield Problem(path, f"is set by {_OURS[key]}; remove it here", value)
        elif key not in EXPERT_KEYS:
            yield _unknown("deepspeed", key, EXPERT_KEYS, value)
        else:
            if key in NESTED_KEYS and isinstance(value, dict):
                for name in value.keys() - NESTED_KEYS[key]:
                    yield _unknown(path, name, NESTED_KEYS[key], value[name])
            yield from _contradictions(path, value, fixed.get(key))


def _unknown(parent: str, key: str, known: frozenset[str], value: Any) -> Problem:
    near = difflib.get_close_matches(key, known, 1, 0.5)
    hint = f"; did you mean {parent}.{near[0]}?" if near else ""
    return Problem(f"{parent}.{key}", f"unknown key of DeepSpeed{hint}", value)


def _contradictions(path: str, value: Any, ours: Any) -> Iterator[Problem]:
    if ours is None:
        return
    if isinstance(ours, dict) and isinstance(value, dict):
        for key in value.keys() & ours.keys():
            yield from _contradictions(f"{path}.{key}", value[key], ours[key])
    elif value != ours:
        source = {
            "deepspeed.bf16": "training.precision",
            "deepspeed.bf16.enabled": "training.precision",
            "deepspeed.zero_optimization": "parallel.zero_stage",
            "deepspeed.zero_optimization.stage": "parallel.zero_stage",
            "deepspeed.gradient_clipping": "optimizer.gradient_clipping",
            "deepspeed.train_micro_batch_size_per_gpu": "training.micro_batch_size",
        }.get(path, "the rest of the configuration")
        yield Problem(path, f"contradicts {source}, which makes it {ours}; remove it here", value)
