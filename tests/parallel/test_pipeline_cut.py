"""The pipeline cut: balanced by FLOPs, complete, and better than a cut by layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations, pairwise
from math import inf, prod

import pytest
from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass, TrainSchedule
from hypothesis import given, settings
from hypothesis import strategies as st

from hg_scale.config.schema import ModelConfig
from hg_scale.errors import UserError
from hg_scale.model.costs import TRAINING_FACTOR, layer_costs
from hg_scale.model.plan import boundary_shapes, layer_plan
from hg_scale.parallel.pipeline_cut import (
    FLOPS_PER_BYTE,
    LayerBytes,
    cut_pipeline,
    micro_batches_in_flight,
)


def model(hierarchy: str, **changes: object) -> ModelConfig:
    """Widths so large that traffic is negligible."""
    sizes = {"d_model": 4096, "heads": 32, "d_ff": 16384, "sequence_length": 4096}
    return ModelConfig(hierarchy=hierarchy, **{**sizes, **changes})  # type: ignore[arg-type]


def test_equal_blocks_are_cut_evenly() -> None:
    cut = cut_pipeline(model("8@1"), 4)
    assert max(cut.flops) / min(cut.flops) < 1.02
    assert 1 < cut.imbalance < 1.05  # the inner stages carry two boundaries, the outer ones one
    assert [b - a for a, b in pairwise(cut.parts)] == [3, 2, 2, 4]  # embedding, norm and head too


def test_shortened_blocks_cost_less() -> None:
    """Half of the layers is not half of the FLOPs: 12 of the 16 blocks are shortened 4 times."""
    hourglass = model("2@1 12@4 2@1", pooling="average", upsampling="repeat")
    cut = cut_pipeline(hourglass, 2)
    flops = [TRAINING_FACTOR * cost.flops for cost in layer_costs(hourglass)]
    assert sum(cut.flops) == sum(flops)
    assert cut.imbalance < 1.1
    by_layers = max(sum(flops[: len(flops) // 4]), sum(flops[len(flops) // 4 :]))
    assert max(cut.flops) < by_layers


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["6@1", "2@1 3@3 1@1", "1@1 1@2 2@4 1@2 2@1", "0@1 4@2 1@1"]),
    st.integers(1, 4),
    st.sampled_from([0, 2, 1000]),
)
def test_cut_is_the_best_of_all(hierarchy: str, stages: int, element: int) -> None:
    """Against every other cut with a block in each stage; 1000 bytes: traffic decides."""
    config = model(hierarchy)
    costs = layer_costs(config)
    cut = cut_pipeline(config, stages, bytes_per_element=element)
    assert cut.parts[0] == 0 and cut.parts[-1] == len(costs)
    plan, factors = layer_plan(config), config.parsed.factors
    crossing = [0.0]  # cost of both directions across each boundary
    for i in range(1, len(plan)):
        shapes = boundary_shapes(config, plan, i, config.sequence_length, factors)
        crossing.append(2 * sum(a * b for a, b in shapes) * element * FLOPS_PER_BYTE)
    crossing.append(0.0)

    def stage_cost(a: int, b: int) -> float:
        flops = TRAINING_FACTOR * sum(cost.flops for cost in costs[a:b])
        return flops + crossing[a] + crossing[b]

    best = None
    for inner in combinations(range(1, len(costs)), stages - 1):
        parts = list(pairwise((0, *inner, len(costs))))
        if all(any(c.layer.kind == "block" for c in costs[a:b]) for a, b in parts):
            slowest = max(stage_cost(a, b) for a, b in parts)
            best = slowest if best is None else min(best, slowest)
    assert max(cut.costs) == pytest.approx(best)


SMALL_HIERARCHIES = ["6@1", "2@1 3@3 1@1", "1@1 1@2 2@4 1@2 2@1", "0@1 4@2 1@1", "1@1 1@8 5@1"]


def all_cuts(config: ModelConfig, stages: int) -> Iterator[list[tuple[int, int]]]:
    """Every cut with a block in each stage, as (start, end) of each stage."""
    plan = layer_plan(config)
    for inner in combinations(range(1, len(plan)), stages - 1):
        parts = list(pairwise((0, *inner, len(plan))))
        if all(any(layer.kind == "block" for layer in plan[a:b]) for a, b in parts):
            yield parts


def slowest_stage(config: ModelConfig, parts: list[tuple[int, int]]) -> float:
    """FLOPs, and bytes of activations, skips and their gradients at the exchange rate."""
    plan, costs = layer_plan(config), layer_costs(config)

    def elements(index: int) -> int:
        if index in (0, len(plan)):
            return 0
        length, factors = config.sequence_length, config.parsed.factors
        return sum(prod(shape) for shape in boundary_shapes(config, plan, index, length, factors))

    return max(
        sum(TRAINING_FACTOR * cost.flops for cost in costs[a:b])
        + 2 * 2 * (elements(a) + elements(b)) * FLOPS_PER_BYTE
        for a, b in parts
    )


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_cut_under_a_memory_limit_is_the_best_that_fits(data: st.DataObject) -> None:
    """With traffic that matters, random bytes per layer, and limits from loose to impossible."""
    width = data.draw(st.sampled_from([32, 128, 512]))
    hierarchy = data.draw(st.sampled_from(SMALL_HIERARCHIES))
    config = model(hierarchy, d_model=width, d_ff=2 * width, heads=4)
    stages, micro_batches = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 5))
    layers = len(layer_plan(config))
    sizes = st.lists(st.integers(0, 9), min_size=layers, max_size=layers)
    state, activations = data.draw(sizes), data.draw(sizes)
    limit = data.draw(st.integers(15, 90)) * 2**30
    needs = LayerBytes(
        [gib * 2**30 for gib in state], [gib * 2**30 for gib in activations], stages, micro_batches
    )

    def bytes_of(parts: list[tuple[int, int]]) -> int:
        held = [min(stages - s, micro_batches) for s in range(stages)]
        return 2**30 * max(
            sum(state[a:b]) + held[s] * sum(activations[a:b]) for s, (a, b) in enumerate(parts)
        )

    cuts = list(all_cuts(config, stages))
    best = min((slowest_stage(config, p) for p in cuts if bytes_of(p) <= limit), default=inf)
    if best == inf:
        smallest = min(map(bytes_of, cuts)) / 2**30
        with pytest.raises(UserError, match=f"the smallest needs {smallest:,.1f}; use more") as e:
            cut_pipeline(config, stages, stage_bytes=needs, memory_limit=limit)
        assert str(e.value).startswith(f"parallel.pipeline = {stages}: no cut into stages fits in ")
        assert "\n" not in str(e.value)
        return
    cut = cut_pipeline(config, stages, stage_bytes=needs, memory_limit=limit)
    parts = list(pairwise(cut.parts))
    assert max(cut.costs) == pytest.approx(best, rel=1e-12)
    assert slowest_stage(config, parts) == pytest.approx(best, rel=1e-12)
    assert bytes_of(parts) <= limit


def test_a_limit_moves_layers_to_later_stages() -> None:
    """The first stage holds four micro-batches, the last one: equal stages would not fit."""
    config = model("16@1")
    layers = len(layer_plan(config))
    needs = LayerBytes([0] * layers, [1] * layers, 4, 8)
    free = cut_pipeline(config, 4)
    limited = cut_pipeline(config, 4, stage_bytes=needs, memory_limit=16)
    assert max(b - a for a, b in pairwise(free.parts)) <= 6
    sizes = [b - a for a, b in pairwise(limited.parts)]
    assert sizes[0] <= 4 and sizes[1] <= 5 and sizes[2] <= 8 and sum(sizes) == layers
    assert max(limited.costs) > max(free.costs)
    assert cut_pipeline(config, 4, stage_bytes=needs, memory_limit=1000) == free


def test_micro_batches_in_flight_are_those_of_deepspeed() -> None:
    for stages in (1, 2, 3, 4, 7):
        for count in (1, 2, 3, 5, 12):
            for stage in range(stages):
                passes: Counter[type] = Counter()
                most = 0
                for step in TrainSchedule(count, stages, stage):
                    passes.update(type(instruction) for instruction in step)
                    most = max(most, passes[ForwardPass] - passes[BackwardPass])
                assert micro_batches_in_flight(stage, stages, count) == most


def test_a_boundary_between_inner_levels_carries_the_open_skips() -> None:
    config = model("1@1 1@2 2@4 1@2 1@1", d_model=[8, 16, 32], heads=[2, 2, 2], sequence_length=20)
    plan = layer_plan(config)
    deepest = next(i for i, layer in enumerate(plan) if layer.name == "level1.stack.1")
    shapes = boundary_shapes(config, plan, deepest, 20, (2, 2))
    assert shapes == [(5, 32), (20, 8), (10, 16)]
    ragged = boundary_shapes(config, plan, deepest, 19, (3, 2))
    assert ragged == [(4, 32), (19, 8), (7, 16)]
    assert boundary_shapes(config, plan, 0, 20, (2, 2)) == [(20, 8)]


def test_bubble_of_the_1f1b_schedule() -> None:
    cut = cut_pipeline(model("8@1"), 4, bytes_per_element=0)
    assert 3 / 11 < cut.bubble(8) < 3 / 11 + 0.01  # nearly equal stages
    assert cut_pipeline(model("8@1"), 4).bubble(8) > cut.bubble(8)  # transfers
    uneven = cut_pipeline(model("2@1 2@4 1@1", pooling="average", upsampling="repeat"), 3)
    assert uneven.imbalance > 1.1
    pace = 8 * max(uneven.flops)
    assert uneven.bubble(8) > 1 - 8 * sum(uneven.flops) / (3 * pace)  # of the slowest stage alone


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="5 pipeline stages"):
        cut_pipeline(model("4@1"), 5)


def test_a_thousand_blocks_are_cut_into_64_stages() -> None:
    cut = cut_pipeline(model("1000@1"), 64)
    assert len(cut.flops) == 64 and cut.parts[-1] == 1003
    assert 1 < cut.imbalance < 1.04  # 16 blocks are 1.024 of the mean, 15.6
