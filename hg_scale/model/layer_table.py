"""A table of a model's layers: shape, sharding, cost, cache. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hg_scale.config.hierarchy import level_lengths
from hg_scale.config.schema import ModelConfig
from hg_scale.model.costs import LayerCost, cache_elements, layer_costs
from hg_scale.model.plan import (
    LayerKind,
    LayerPlan,
    model_levels,
    pooling_projection,
    upsampling_projection,
)


@dataclass(frozen=True)
class LayerRow:
    """One layer, or several consecutive blocks of a stack.

    `positions`, `width`: of its level. `flops`: of the forward pass of one sequence, and their
    `share` of the complete model's. `cache`: elements that decoding a sequence of that length
    caches. `split`: the dimensions that tensor parallelism shards; "" if it replicates the layer.
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
    """Return the rows in the order of the forward pass."""
    costs = layer_costs(model)
    cached = cache_elements(model, model.sequence_length)
    levels = model_levels(model)
    lengths = level_lengths(model.sequence_length, model.parsed.factors)
    total_flops = sum(cost.flops for cost in costs)
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
            share=flops / total_flops,
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
    upper, lower = (model_levels(model)[layer.level + i] for i in (0, 1))
    shortens = layer.kind == "shorten"
    kind = model.pooling_kind if shortens else model.upsampling_kind
    projection = pooling_projection if shortens else upsampling_projection
    k = lower.factor // upper.factor
    projects = projection(kind, k, upper.d_model, lower.d_model) is not None
    return ", ".join(["input"] * projects + ["heads, d_ff"] * kind.attends)


def _groups(costs: Sequence[LayerCost]) -> list[list[LayerCost]]:
    """Group the blocks of each stack; any other layer is a group of its own."""
    groups: list[list[LayerCost]] = []
    for cost in costs:
        previous = groups[-1][-1].layer if groups else None
        if (
            previous
            and previous.kind == cost.layer.kind == "block"
            and _stack(previous.name) == _stack(cost.layer.name)
        ):
            groups[-1].append(cost)
        else:
            groups.append([cost])
    return groups


def _stack(name: str) -> str:
    return name.rpartition(".")[0]


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]
