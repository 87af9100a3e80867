"""DeepSpeed's own configuration, which is generated from ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from hg_scale.config.errors import Problem
from hg_scale.config.read import merge
from hg_scale.config.schema import Config


def generated_settings(config: Config, micro_batches: int) -> dict[str, Any]:
    """Return the part of DeepSpeed's configuration that is derived from ours.

    `micro_batches`: per optimizer step and data-parallel rank (gradient accumulation).
    """
    bf16, stage = config.training.precision == "bf16", config.parallel.zero_stage
    clip = config.optimizer.gradient_clipping
    if stage == 0 and clip == 0:
        clip = 1e30  # never clips; without it DeepSpeed computes no gradient norm under ZeRO 0
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.training.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": clip,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 1_000_000_000,  # the run has its own log
        "zero_allow_untested_optimizer": True,  # torch's Adam, which DeepSpeed does not list
    }
    if bf16:
        # Micro-batches are accumulated in fp32: bf16 sums would lose most of the later ones. Under
        # stage 1 every rank holds the unsharded sum (4 bytes per parameter), under 2 and 3 a shard.
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


def deepspeed_config(config: Config, micro_batches: int) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`: expert keys and generated settings."""
    return merge(config.deepspeed.model_dump(), generated_settings(config, micro_batches))


def deepspeed_problems(config: Config) -> Iterator[Problem]:
    """Check for expert keys that contradict ours, or that DeepSpeed refuses in this layout."""
    keys, stage = config.deepspeed, config.parallel.zero_stage
    same = {
        "bf16.enabled": ("training.precision", config.training.precision == "bf16"),
        "zero_optimization.stage": ("parallel.zero_stage", stage),
        "gradient_clipping": ("optimizer.gradient_clipping", config.optimizer.gradient_clipping),
        "train_micro_batch_size_per_gpu": (
            "training.micro_batch_size",
            config.training.micro_batch_size,
        ),
    }
    for path, (source, expected) in same.items():
        value = attrgetter(path)(keys)
        if value not in (None, expected):
            yield Problem(
                f"deepspeed.{path}",
                f"contradicts {source}, which sets it to {json.dumps(expected)}; remove it here",
                value,
                (source,),
            )
    scaled = {
        "prescale_gradients": (keys.prescale_gradients, False),
        "gradient_predivide_factor": (keys.gradient_predivide_factor, 1.0),
    }
    if stage >= 2 and keys.zero_optimization.reduce_scatter is not False:
        for name, (value, plain) in scaled.items():
            if value not in (None, plain):
                yield Problem(
                    f"deepspeed.{name}",
                    f"ZeRO {stage} scatters unscaled gradients; remove it, or set "
                    "deepspeed.zero_optimization.reduce_scatter = false",
                    value,
                    ("parallel.zero_stage", "deepspeed.zero_optimization.reduce_scatter"),
                )
