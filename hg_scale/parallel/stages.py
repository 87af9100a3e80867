"""Where a pipeline is cut: by floating-point operations, not by layers or parameters.

A block at factor 3 has the parameters of any other and a third of the work or less. A cut inside
the valley also carries every open skip, whose traffic is counted. Pure Python: a dry run prints it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf, prod

from hg_scale.config.schema import ModelConfig
from hg_scale.model.costs import TRAINING_FACTOR, layer_costs
from hg_scale.model.plan import boundary_shapes, layer_plan

# What a byte across a boundary is worth: bf16 FLOP/s of an H100 over a 400 Gbit/s link.
FLOPS_PER_BYTE = 989e12 / 50e9


@dataclass(frozen=True)
class Cut:
    """`parts[s]:parts[s + 1]` are the layers of stage s; the rest is for one training window.

    `flops`: training FLOPs of each stage; `traffic`: elements into each stage, one way; `costs`:
    what the cut balances, FLOPs and what the traffic is worth in FLOPs.
    """

    parts: tuple[int, ...]
    flops: tuple[int, ...]
    traffic: tuple[int, ...]
    costs: tuple[float, ...]

    @property
    def imbalance(self) -> float:
        """The slowest stage over the mean of all, traffic included; 1 is perfect."""
        return max(self.costs) * len(self.costs) / sum(self.costs)

    def bubble(self, micro_batches: int) -> float:
        """Idle fraction of a 1F1B schedule with equal stages."""
        idle = len(self.flops) - 1
        return idle / (micro_batches + idle)


def cut_pipeline(model: ModelConfig, stages: int, bytes_per_element: int = 2) -> Cut:
    """The cut whose slowest stage, traffic included, is fastest; ties go to less traffic.

    Every stage has at least one block. Raises ValueError with fewer blocks than stages.
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
        # Activations come in and go out, their gradients the other way.
        crossing = 2 * (traffic[a] + (traffic[b] if b < layers else 0))
        return flops_before[b] - flops_before[a] + crossing * bytes_per_element * FLOPS_PER_BYTE

    # rows[n][start]: the best cut of the layers from `start` into n + 1 stages, as (cost of the
    # slowest, traffic, end of the first).
    rows = [[(stage_cost(start, layers), 0, layers) for start in range(layers)]]
    for left in range(2, stages + 1):
        row = []
        for start in range(layers - left + 1):
            best = (inf, 0, layers)
            for end in range(start + 1, layers - left + 2):
                if flops_before[end] - flops_before[start] > best[0]:
                    break  # further ends make the first stage slower still
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
    return Cut(
        tuple(parts),
        tuple(sum(flops[a:b]) for a, b in pairwise(parts)),
        tuple(traffic[a] for a in parts[:-1]),
        tuple(stage_cost(a, b) for a, b in pairwise(parts)),
    )
