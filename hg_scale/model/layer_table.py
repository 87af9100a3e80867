"""The layers of a model as a person reads them: shape, sharding, cost, cache. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hg_scale.config.hierarchy import level_lengths
from hg_scale.config.schema import ModelConfig
from hg_scale.model.costs import LayerCost, cached_numbers, layer_costs
from hg_scale.model.plan import LayerKind, LayerPlan, model_levels


@dataclass(frozen=True)
class LayerRow:
    """A layer, or equal blocks that follow each other.

    `positions` and `width` are those of the level that it belongs to; `flops` are of the forward
    pass of one window, `share` is their part of the whole model's; `cache` are the numbers that
    decoding a text of that length keeps. `split`: what tensor parallelism shares out; "" where
    every tensor rank holds the whole layer.
    """

    name: str
    kind: LayerKind
    level: int
    layers: int
    positions: int
    width: int
    parameters: int
    flops: int
    share: float
    cache: int
    split: str


def layer_table(model: ModelConfig) -> list[LayerRow]:
    """The rows in the order of the forward pass."""
    costs = layer_costs(model)
    cached = cached_numbers(model, model.sequence_length)
    levels = model_levels(model)
    lengths = level_lengths(model.sequence_length, model.parsed.factors)
    whole = sum(cost.flops for cost in costs)
    rows = []
    for group in _groups(costs):
        first, last = group[0].layer, group[-1].layer
        flops = sum(cost.flops for cost in group)
        rows.append(LayerRow(
            name=first.name if len(group) == 1 else f"{first.name} .. {_last_part(last.name)}",
            kind=first.kind,
            level=first.level,
            layers=len(group),
            positions=lengths[first.level],
            width=levels[first.level].d_model,
            parameters=sum(cost.parameters for cost in group),
            flops=flops,
            share=flops / whole,
            cache=sum(sum(cached[cost.layer.name]) for cost in group),
            split=_split(model, first),
        ))  # fmt: skip
    return rows


def _split(model: ModelConfig, layer: LayerPlan) -> str:
    if layer.kind in ("embedding", "head"):
        return "vocabulary"
    if layer.kind == "block":
        return "heads, d_ff"
    if layer.kind == "norm":
        return ""
    kind = model.pooling if layer.kind == "shorten" else model.upsampling
    upper, lower = (model_levels(model)[layer.level + i].d_model for i in (0, 1))
    base = kind.rpartition("+")[2]
    projects = base == "linear" or (upper != lower and base != "none")
    parts = ["input"] * projects + ["heads, d_ff"] * kind.startswith("attention")
    return ", ".join(parts)


def _groups(costs: Sequence[LayerCost]) -> list[list[LayerCost]]:
    """Blocks of one stack together, any other layer by itself."""
    groups: list[list[LayerCost]] = []
    for cost in costs:
        before = groups[-1][-1].layer if groups else None
        if (
            before
            and before.kind == cost.layer.kind == "block"
            and _stack(before.name) == _stack(cost.layer.name)
        ):
            groups[-1].append(cost)
        else:
            groups.append([cost])
    return groups


def _stack(name: str) -> str:
    return name.rpartition(".")[0]


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]
