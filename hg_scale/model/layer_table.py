"""The layers of a model with their shapes and costs, as a person reads them. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hg_scale.config.hierarchy import scale_lengths
from hg_scale.config.schema import ModelConfig
from hg_scale.model.costs import LayerCost, layer_costs
from hg_scale.model.plan import Kind, model_scales


@dataclass(frozen=True)
class LayerRow:
    """A layer, or equal blocks that follow each other.

    `positions` and `width` are those of the scale that it belongs to; `flops` are of the forward
    pass of one window, `share` is their part of the whole model's.
    """

    name: str
    kind: Kind
    scale: int
    layers: int
    positions: int
    width: int
    parameters: int
    flops: int
    share: float


def layer_table(model: ModelConfig) -> list[LayerRow]:
    """The rows in the order of the forward pass."""
    costs = layer_costs(model)
    scales = model_scales(model)
    lengths = scale_lengths(model.sequence_length, model.parsed.factors)
    whole = sum(cost.flops for cost in costs)
    rows = []
    for group in _groups(costs):
        first, last = group[0].layer, group[-1].layer
        flops = sum(cost.flops for cost in group)
        rows.append(LayerRow(
            name=first.name if len(group) == 1 else f"{first.name} .. {_last_part(last.name)}",
            kind=first.kind,
            scale=first.scale,
            layers=len(group),
            positions=lengths[first.scale],
            width=scales[first.scale].d_model,
            parameters=sum(cost.parameters for cost in group),
            flops=flops,
            share=flops / whole,
        ))  # fmt: skip
    return rows


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
