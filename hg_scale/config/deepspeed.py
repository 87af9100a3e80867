"""DeepSpeed's own configuration: generated, never written by hand."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from typing import Any

from hg_scale.config.errors import Problem
from hg_scale.config.schema import Config

# The keys that may be set, and inside objects those of the object (DeepSpeed 0.19). Others it
# ignores, at the top, or refuses, deeper down, once the processes are up; and it has some that
# nothing here is made for, as offloading. All these are refused before.
_KEYS: dict[str, str | None] = {
    "bf16": "enabled immediate_grad_update",
    "checkpoint": "load_universal",
    "comms_logger": "debug enabled prof_all prof_ops verbose",
    "communication_data_type": None,
    "data_types": "grad_accum_dtype",
    "disable_allgather": None,
    "dump_state": None,
    "flops_profiler": """
        detailed enabled module_depth output_file profile_step recompute_fwd_factor top_modules""",
    "gradient_clipping": None,
    "gradient_predivide_factor": None,
    "memory_breakdown": None,
    "prescale_gradients": None,
    "train_micro_batch_size_per_gpu": None,
    "wall_clock_breakdown": None,
    "zero_optimization": """
        allgather_bucket_size allgather_partitions contiguous_gradients ignore_unused_parameters
        log_trace_cache_warnings memory_efficient_linear overlap_comm reduce_bucket_size
        reduce_scatter round_robin_gradients stage stage3_max_live_parameters
        stage3_max_reuse_distance stage3_model_persistence_threshold
        stage3_module_granularity_threshold stage3_param_persistence_threshold
        stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params sub_group_size
        use_multi_rank_bucket_allreduce zero_hpz_partition_size zero_quantized_gradients
        zero_quantized_nontrainable_weights zero_quantized_weights""",
}
EXPERT_KEYS = {
    key: None if names is None else frozenset(names.split()) for key, names in _KEYS.items()
}
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
    """Expert keys that are not handed on, or that contradict the generated ones."""
    fixed = generated(config, 1)
    for key, value in config.deepspeed.items():
        path = f"deepspeed.{key}"
        if key in _OURS:
            yield Problem(path, f"is set by {_OURS[key]}; remove it here", value)
        elif key not in EXPERT_KEYS:
            yield _unknown("deepspeed", key, EXPERT_KEYS, value)
        else:
            inner = EXPERT_KEYS[key]
            if inner is not None and not isinstance(value, dict):
                yield Problem(path, f"expected an object with some of {', '.join(sorted(inner))}")
            elif inner is not None:
                for name in sorted(value.keys() - inner):
                    yield _unknown(path, name, inner, value[name])
            yield from _contradictions(path, value, fixed.get(key))


def _unknown(parent: str, key: str, known: Collection[str], value: Any) -> Problem:
    near = difflib.get_close_matches(key, known, 1, 0.5)
    hint = f"; did you mean {parent}.{near[0]}?" if near else f"; those are {', '.join(known)}"
    return Problem(f"{parent}.{key}", f"not one of the keys handed to DeepSpeed{hint}", value)


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
