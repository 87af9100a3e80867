"""The pipeline cut: balanced by FLOPs, complete, and better than a cut by layers."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hg_scale.config.schema import ModelConfig
from hg_scale.model.costs import TRAINING_FACTOR, layer_costs
from hg_scale.model.plan import boundary_shapes, layer_plan
from hg_scale.parallel.pipeline_cut import FLOPS_PER_BYTE, cut_pipeline


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
