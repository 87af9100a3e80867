"""The flat list of layers that a hierarchy stands for, in plain data.

Everything that walks the model walks this list: the module itself, the costs, the pipeline's cut,
the names in a checkpoint. It needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hg_scale.config.hierarchy import Level, scale_factors, scale_lengths
from hg_scale.config.schema import ModelConfig, Positions

Kind = Literal["embedding", "block", "norm", "shorten", "upsample", "head"]


@dataclass(frozen=True)
class Scale:
    """The shape of the model at one scale; scale 0 is the full length."""

    index: int
    factor: int  # total shortening
    d_model: int
    heads: int
    d_ff: int
    window: int | None
    positions: Positions


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its name in checkpoints, what it is, and the scale it belongs to.

    `shorten` and `upsample` join `scale` to the next deeper one; `level` is theirs.
    """

    name: str
    kind: Kind
    scale: int
    level: int = -1


def model_scales(model: ModelConfig) -> list[Scale]:
    """Every scale of the model, outermost first."""
    columns = ("d_model", "heads", "d_ff", "window", "positions")
    values = zip(*(model.by_level(key) for key in columns), strict=True)
    factors = scale_factors(model.parsed.factors)
    return [Scale(i, f, *row) for i, (f, row) in enumerate(zip(factors, values, strict=True))]


def layer_plan(model: ModelConfig) -> list[LayerPlan]:
    """The layers in the order of the forward pass (paper, Algorithm 1).

    Every stack of blocks ends in a norm, as in the authors' code; a stack may be empty.
    """
    hierarchy = model.parsed
    plan = [LayerPlan("embedding", "embedding", 0)]
    plan += _stack("pre", 0, hierarchy.pre)
    if hierarchy.levels:
        plan += _valley(hierarchy.levels, 0)
    if hierarchy.post is not None:
        plan += _stack("post", 0, hierarchy.post)
    return [*plan, LayerPlan("head", "head", 0)]


def _stack(name: str, scale: int, blocks: int) -> list[LayerPlan]:
    layers = [LayerPlan(f"{name}.{i}", "block", scale) for i in range(blocks)]
    return [*layers, LayerPlan(f"{name}.norm", "norm", scale)]


def _valley(levels: tuple[Level, ...], j: int) -> list[LayerPlan]:
    here, blocks = f"level{j}", levels[j].blocks
    if j == len(levels) - 1:
        inside = _stack(f"{here}.stack", j + 1, blocks)
    else:
        inside = [
            *_stack(f"{here}.pre", j + 1, blocks),
            *_valley(levels, j + 1),
            *_stack(f"{here}.post", j + 1, blocks),
        ]
    down = LayerPlan(f"{here}.shorten", "shorten", j, j)
    up = LayerPlan(f"{here}.upsample", "upsample", j, j)
    return [down, *inside, up]


def boundary_shapes(
    model: ModelConfig, plan: list[LayerPlan], index: int, length: int, factors: tuple[int, ...]
) -> list[tuple[int, int]]:
    """(positions, width) of what crosses the boundary before layer `index`.

    The activations come first, then the open skips, outermost first.
    """
    lengths, widths = scale_lengths(length, factors), model.by_level("d_model")
    depth = 0
    for layer in plan[:index]:
        depth += {"shorten": 1, "upsample": -1}.get(layer.kind, 0)
    return [(lengths[s], widths[s]) for s in (depth, *range(depth))]
