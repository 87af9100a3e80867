"""DeepSpeed's own configuration: generated, never written by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from hg_scale.config.errors import Problem
from hg_scale.config.read import merge
from hg_scale.config.schema import Config


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
    """What `deepspeed.initialize` gets: the expert keys, and the generated part over them."""
    return merge(config.deepspeed.model_dump(), generated(config, micro_batches))


def deepspeed_problems(config: Config) -> Iterator[Problem]:
    """Expert keys that contradict ours, or that DeepSpeed refuses in this layout."""
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
    for path, (source, ours) in same.items():
        value = attrgetter(path)(keys)
        if value not in (None, ours):
            yield Problem(
                f"deepspeed.{path}",
                f"contradicts {source}, which makes it {json.dumps(ours)}; remove it here",
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
                    f"ZeRO {stage} scatters gradients as they are; remove it, or set "
                    "deepspeed.zero_optimization.reduce_scatter = false",
                    value,
                    ("parallel.zero_stage", "deepspeed.zero_optimization.reduce_scatter"),
                )
