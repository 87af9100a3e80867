"""Which ranks and tensors made a step bad, in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from math import isfinite
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from hg_scale.checkpoint.fragments import Slice
from hg_scale.training.gradients import gradients_by_parameter

_NAMED = 4  # tensors in a line; the others are counted


def name_culprits(
    why: str, mean_loss: Tensor, engine: Any, slices: Mapping[nn.Parameter, Slice]
) -> str:
    """`why` with what is not finite, and the ranks that hold it.

    Data-parallel ranks hold the sum of their gradients, so that what one of them spoils they all
    hold; a loss is each rank's own. A collective operation of all ranks.
    """
    names = [
        slices[parameter].name
        for parameter, gradient in gradients_by_parameter(engine, slices)
        if not bool(gradient.isfinite().all())
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (float(mean_loss), names))
    return in_words(why, everyone)


def in_words(why: str, everyone: list[tuple[float, list[str]]]) -> str:
    """`everyone`: each rank's loss and the names of its tensors that are not finite."""
    losses = [f"{loss} on rank {r}" for r, (loss, _) in enumerate(everyone) if not isfinite(loss)]
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, (_, names) in enumerate(everyone):
        for name in names:
            ranks[name].append(rank)
    said = [f"the loss is {_first(losses)}"] if losses else []
    if ranks:
        tensors = _first([f"{name} ({_ranks(on)})" for name, on in ranks.items()])
        count = "1 tensor" if len(ranks) == 1 else f"{len(ranks)} tensors"
        said.append(f"gradients of {count} are not finite: {tensors}")
    return "; ".join(said) or why


def _first(items: list[str]) -> str:
    more = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return "ranks " + _first([str(rank) for rank in ranks])
