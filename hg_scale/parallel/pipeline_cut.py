"""Cut the layer list into pipeline stages by FLOPs, not by layers or parameters.

A block at factor 3 has as many parameters as any other but a third of the FLOPs or less. A cut
between inner levels also transfers every open skip; its traffic counts. Pure Python, for dry runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf, prod

from hg_scale.config.schema import ModelConfig
from hg_scale.model.costs import TRAINING_FACTOR, layer_costs
from hg_scale.model.plan import boundary_shapes, layer_plan
from hg_scale.parallel.pipeline_schedule import simulate_step

# Cost of a byte across a boundary in FLOPs: bf16 FLOP/s of an H100 over a 400 Gbit/s link.
FLOPS_PER_BYTE = 989e12 / 50e9


@dataclass(frozen=True)
class PipelineCut:
    """Layers and costs of the pipeline stages: stage s has layers `parts[s]:parts[s + 1]`.

    Per training sequence and stage: `flops` of training; `traffic`, elements received in the
    forward pass; `costs`, FLOPs plus traffic converted to FLOPs, which the cut balances.
    """

    parts: tuple[int, ...]
    flops: tuple[int, ...]
    traffic: tuple[int, ...]
    costs: tuple[float, ...]
    bytes_per_element: int = 2

    @property
    def imbalance(self) -> float:
        """Cost of the slowest stage over the mean cost; 1 is perfect balance."""
        return max(self.costs) * len(self.costs) / sum(self.costs)

    def bubble(self, micro_batches: int) -> float:
        """Return the share of a step in which stages wait or transfer, simulated."""
        forward = [flops / TRAINING_FACTOR for flops in self.flops]
        backward = [flops - f for flops, f in zip(self.flops, forward, strict=True)]
        per_element = self.bytes_per_element * FLOPS_PER_BYTE
        transfer = [elements * per_element for elements in self.traffic[1:]]
        return simulate_step(forward, backward, transfer, micro_batches).bubble


def cut_pipeline(model: ModelConfig, stages: int, bytes_per_element: int = 2) -> PipelineCut:
    """Return the cut that minimises the cost of the slowest stage, then the traffic.

    Every stage gets at least one block. Raises ValueError with fewer blocks than stages.
    """
    plan = layer_plan(model)
    flops = [TRAINING_FACTOR * cost.flops for cost in layer_costs(model)]
    traffic = [0] * len(plan)
    for i in range(1, len(plan)):
        shapes = boundary_shapes(model, plan, i, model.sequence_length, model.parsed.factors)
        traffic[i] = sum(prod(shape) for shape in shapes)
    layers = len(plan)
    flops_before = list(accumulate(flops, initial=0))
    blocks_before = list(accumulate((layer.kind == "block" for layer in plan), initial=0))

    def stage_cost(a: int, b: int) -> float:
        if blocks_before[a] == blocks_before[b]:
            return inf
        # Both boundaries: activations forward, their gradients backward.
        crossing = 2 * (traffic[a] + (traffic[b] if b < layers else 0))
        return flops_before[b] - flops_before[a] + crossing * bytes_per_element * FLOPS_PER_BYTE

    # rows[n][start]: the best cut of layers `start:` into n + 1 stages, as (cost of the slowest
    # stage, traffic, end of the first stage).
    rows = [[(stage_cost(start, layers), 0, layers) for start in range(layers)]]
    for left in range(2, stages + 1):
        row = []
        for start in range(layers - left + 1):
            best = (inf, 0, layers)
            for end in range(start + 1, layers - left + 2):
                if flops_before[end] - flops_before[start] > best[0]:
                    break  # a later end only makes the first stage slower
                cost, crossing, _ = rows[-1][end]
                slowest = max(stage_cost(start, end), cost)
                best = min(best, (slowest, crossing + traffic[end], end))
            row.append(best)
        rows.append(row)

    if stages > layers or rows[-1][0][0] == inf:
        raise ValueError(f"{stages} pipeline stages need as many blocks, got {blocks_before[-1]}")
    parts = [0]
    for row in reversed(rows):
        parts.append(row[parts[-1]][2])
    return PipelineCut(
        tuple(parts),
        tuple(sum(flops[a:b]) for a, b in pairwise(parts)),
        tuple(traffic[a] for a in parts[:-1]),
        tuple(stage_cost(a, b) for a, b in pairwise(parts)),
        bytes_per_element,
    )
