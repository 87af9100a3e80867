"""Cut the layer list into pipeline stages by FLOPs, not by layers or parameters.

A block at factor 3 has as many parameters as any other but a third of the FLOPs or less. A cut
between inner levels also transfers every open skip; its traffic counts. A limit on the bytes of a
stage rules out cuts that do not fit. Pure Python, for dry runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from math import inf, prod

from hg_scale.config.schema import ModelConfig
from hg_scale.errors import UserError
from hg_scale.model.costs import TRAINING_FACTOR, layer_costs
from hg_scale.model.plan import boundary_shapes, layer_plan
from hg_scale.parallel.pipeline_schedule import simulate_step

# Cost of a byte across a boundary in FLOPs: bf16 FLOP/s of an H100 over a 400 Gbit/s link.
FLOPS_PER_BYTE = 989e12 / 50e9

# (stage, start, end) -> a number of that stage if it has layers `start:end`
StageFunction = Callable[[int, int, int], float]


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


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of a stage from those of its layers, per GPU; a function of (stage, start, end).

    By layer: `state`, bytes of weights, gradients and optimizer states; `activations`, bytes that
    one micro-batch keeps from its forward to its backward pass.
    """

    state: Sequence[float]
    activations: Sequence[float]
    stages: int
    micro_batches: int

    def __call__(self, stage: int, start: int, end: int) -> float:
        state, activations = self._before
        kept = micro_batches_in_flight(stage, self.stages, self.micro_batches)
        return state[end] - state[start] + kept * (activations[end] - activations[start])

    @cached_property
    def _before(self) -> tuple[list[float], list[float]]:
        state, activations = (
            list(accumulate(values, initial=0.0)) for values in (self.state, self.activations)
        )
        return state, activations


def micro_batches_in_flight(stage: int, stages: int, micro_batches: int) -> int:
    """Return how many micro-batches a stage holds at most between their passes, under 1F1B."""
    return min(stages - stage, micro_batches)


def cut_pipeline(
    model: ModelConfig,
    stages: int,
    bytes_per_element: int = 2,
    *,
    stage_bytes: StageFunction | None = None,
    memory_limit: float = inf,
) -> PipelineCut:
    """Return the cut that minimises the cost of the slowest stage; ties prefer less traffic.

    Every stage gets at least one block. With `stage_bytes`, only cuts of which no stage takes more
    than `memory_limit` bytes count; it must not shrink when a layer is added: see `LayerBytes`.
    Raises ValueError with fewer blocks than stages, UserError if no cut fits.
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
    if stages > blocks_before[-1]:
        raise ValueError(f"{stages} pipeline stages need as many blocks, got {blocks_before[-1]}")

    def computing(stage: int, a: int, b: int) -> float:
        """FLOPs of a stage; infinitely many where it does not fit."""
        fits = stage_bytes is None or stage_bytes(stage, a, b) <= memory_limit
        return flops_before[b] - flops_before[a] if fits else inf

    def without_block(a: int, b: int) -> float:
        return inf if blocks_before[a] == blocks_before[b] else 0

    def communicating(a: int, b: int) -> float:
        """FLOPs in the time of the traffic over both boundaries, activations and gradients."""
        crossing = 2 * (traffic[a] + (traffic[b] if b < layers else 0))
        return crossing * bytes_per_element * FLOPS_PER_BYTE + without_block(a, b)

    slowest, parts = _best_parts(stages, traffic, computing, communicating)
    if stage_bytes and slowest == inf:
        need, _ = _best_parts(stages, traffic, stage_bytes, without_block)
        raise UserError(
            f"parallel.pipeline = {stages}: no cut into stages fits in {memory_limit / 2**30:,.1f} "
            f"GiB per GPU, the smallest needs {need / 2**30:,.1f}; use more stages, a larger "
            "parallel.tensor, a smaller training.micro_batch_size or "
            "training.activation_checkpointing"
        )
    return PipelineCut(
        parts,
        tuple(sum(flops[a:b]) for a, b in pairwise(parts)),
        tuple(traffic[a] for a in parts[:-1]),
        tuple(flops_before[b] - flops_before[a] + communicating(a, b) for a, b in pairwise(parts)),
        bytes_per_element,
    )


def _best_parts(
    stages: int,
    traffic: Sequence[int],
    growing: StageFunction,
    extra: Callable[[int, int], float],
) -> tuple[float, tuple[int, ...]]:
    """Return the smallest possible maximum over the stages of `growing` + `extra`, and its parts.

    Infinity and no parts where there is no finite one. `growing` must not shrink as a range gets
    longer. `traffic`: elements that cross a cut before each layer; their sum decides between equal
    cuts of the remaining layers.
    """
    layers = len(traffic)
    # rows[n][start]: the best cut of layers `start:` into n + 1 stages, as (cost of the slowest
    # stage, traffic, end of the first stage).
    rows = [
        [
            (growing(stages - 1, start, layers) + extra(start, layers), 0, layers)
            for start in range(layers)
        ]
    ]
    for left in range(2, stages + 1):
        row = []
        for start in range(layers - left + 1):
            best = (inf, 0, layers)
            for end in range(start + 1, layers - left + 2):
                least = growing(stages - left, start, end)
                if least > best[0] or least == inf:
                    break  # a later end only makes the first stage slower
                cost, crossing, _ = rows[-1][end]
                slowest = max(least + extra(start, end), cost)
                best = min(best, (slowest, crossing + traffic[end], end))
            row.append(best)
        rows.append(row)
    slowest, parts = rows[-1][0][0], [0]
    if slowest < inf:
        for row in reversed(rows):
            parts.append(row[parts[-1]][2])
    return slowest, tuple(parts)
