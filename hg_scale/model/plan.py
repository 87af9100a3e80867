"""The flat list of layers that a hierarchy describes, as plain data.

Everything that iterates over the model iterates over this list: the module itself, the costs, the
pipeline cut, the parameter names in a checkpoint. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hg_scale.config.hierarchy import Shortening, level_factors, level_lengths
from hg_scale.config.resampling_kind import ResamplingKind
from hg_scale.config.schema import ModelConfig, Positions

LayerKind = Literal["embedding", "block", "norm", "shorten", "upsample", "head"]


@dataclass(frozen=True)
class Level:
    """The shape of the model at one level; level 0 is the full length."""

    index: int
    factor: int  # total shortening
    d_model: int
    heads: int
    d_ff: int
    window: int | None
    positions: Positions


@dataclass(frozen=True)
class LayerPlan:
    """One layer: its name in checkpoints, its kind, and its level.

    `shorten` and `upsample` connect `level` to `level + 1`. In names, `level0` is what the first
    shortening encloses: the blocks of `level0.pre` are at level 1.
    """

    name: str
    kind: LayerKind
    level: int


def model_levels(model: ModelConfig) -> list[Level]:
    """Return every level of the model, outermost first."""
    columns = ("d_model", "heads", "d_ff", "window", "positions")
    values = zip(*(model.by_level(key) for key in columns), strict=True)
    factors = level_factors(model.parsed.factors)
    return [Level(i, f, *row) for i, (f, row) in enumerate(zip(factors, values, strict=True))]


def pooling_projection(
    kind: ResamplingKind, k: int, upper: int, lower: int
) -> tuple[int, int] | None:
    """Return (input, output) features of a pooling's linear layer; None: it has none.

    It pools k positions of width `upper` into one of width `lower`.
    """
    if kind.base == "linear":
        return k * upper, lower
    return None if upper == lower else (upper, lower)


def upsampling_projection(
    kind: ResamplingKind, k: int, upper: int, lower: int
) -> tuple[int, int] | None:
    """Return (input, output) features of an upsampling's linear layer; None: it has none.

    It expands one position of width `lower` to k of width `upper`.
    """
    if kind.base == "linear":
        return lower, k * upper
    return None if upper == lower or kind.base == "none" else (lower, upper)


def layer_plan(model: ModelConfig) -> list[LayerPlan]:
    """Return the layers in the order of the forward pass (paper, Algorithm 1).

    Every stack of blocks ends in a norm, as in the authors' code; a stack may have no blocks.
    """
    hierarchy = model.parsed
    plan = [LayerPlan("embedding", "embedding", 0)]
    plan += _stack("pre", 0, hierarchy.pre)
    if hierarchy.shortenings:
        plan += _inner_levels(hierarchy.shortenings, 0)
    if hierarchy.post is not None:
        plan += _stack("post", 0, hierarchy.post)
    return [*plan, LayerPlan("head", "head", 0)]


def _stack(name: str, level: int, blocks: int) -> list[LayerPlan]:
    layers = [LayerPlan(f"{name}.{i}", "block", level) for i in range(blocks)]
    return [*layers, LayerPlan(f"{name}.norm", "norm", level)]


def _inner_levels(shortenings: tuple[Shortening, ...], level: int) -> list[LayerPlan]:
    """Return the layers from the shortening at `level` to the upsampling back to it."""
    name, blocks = f"level{level}", shortenings[level].blocks
    if level == len(shortenings) - 1:
        inside = _stack(f"{name}.stack", level + 1, blocks)
    else:
        inside = [
            *_stack(f"{name}.pre", level + 1, blocks),
            *_inner_levels(shortenings, level + 1),
            *_stack(f"{name}.post", level + 1, blocks),
        ]
    down = LayerPlan(f"{name}.shorten", "shorten", level)
    up = LayerPlan(f"{name}.upsample", "upsample", level)
    return [down, *inside, up]


def boundary_shapes(
    model: ModelConfig, plan: list[LayerPlan], index: int, length: int, factors: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Return (positions, width) of every tensor that crosses a pipeline boundary before `index`.

    The activations come first, then the open skips, outermost first.
    """
    lengths, widths = level_lengths(length, factors), model.by_level("d_model")
    level = 0
    for layer in plan[:index]:
        level += {"shorten": 1, "upsample": -1}.get(layer.kind, 0)
    return [(lengths[j], widths[j]) for j in (level, *range(level))]
