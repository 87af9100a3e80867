"""Where DeepSpeed holds the gradients of a step just before its optimizer takes it.

They are reduced by then. Tried with DeepSpeed 0.19.8; what it moves is noticed by
`tests/training/test_skipped_steps.py`.

- ZeRO 0: in the parameters.
- ZeRO 1 in bf16 (BF16_Optimizer): in a flat fp32 buffer for each parameter group.
- ZeRO 1 and 2: this rank's share of each group, as the list of its pieces.
- ZeRO 3: this rank's share of each parameter, by sub-group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def local_gradients(engine: Any, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """All that this rank's update is made from; the data-parallel ranks together hold it all."""
    if groups := _groups(engine.optimizer):
        return [gradient for group in groups for gradient in group]
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def gradients_by_parameter(
    engine: Any, parameters: Iterable[nn.Parameter]
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The same by parameter, for those of which this rank holds something; makes copies."""
    groups = _groups(engine.optimizer)
    if groups and hasattr(engine.optimizer, "fp16_groups"):  # ZeRO 3
        for members, gradients in zip(engine.optimizer.fp16_groups, groups, strict=True):
            yield from zip(members, gradients, strict=True)
        return
    flat = [torch.cat([gradient.flatten() for gradient in group]) for group in groups]
    for parameter in parameters:
        if mapping := getattr(parameter, "_hp_mapping", None):
            place = mapping.hp_fragment_address
            yield parameter, flat[mapping.param_group_index].narrow(0, place.start, place.numel)
        elif not groups and parameter.grad is not None:
            yield parameter, parameter.grad


def _groups(optimizer: Any) -> list[list[Tensor]]:
    """Gradients by group in the order of DeepSpeed's groups; none without ZeRO."""
    if hasattr(optimizer, "averaged_gradients"):
        averaged = optimizer.averaged_gradients
        return [averaged[group] for group in sorted(averaged)]
    return [[flat] for flat in getattr(optimizer, "fp32_groups_gradient_flat_partition", ())]


@contextmanager
def skip_optimizer_step(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the optimizer's step does nothing.

    DeepSpeed then reads and clears the gradients as in any step, whatever its buffers are; weights,
    moments and Adam's count of steps stay, and the copies that the model computes with are rounded
    from the same weights again.
    """
    optimizer.step = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del optimizer.step
