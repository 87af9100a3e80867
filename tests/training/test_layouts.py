"""Every parallel layout has the loss curve of one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.training.models import BY_LEVEL, PAPER, layout, run_layout
from tests.world import Worlds

STEPS = 20
MODELS = {"paper": PAPER, "by_level": BY_LEVEL}

# name: (world size, tensor, pipeline, ZeRO stages in fp32, ZeRO stages in bf16)
LAYOUTS: dict[str, tuple[int, int, int, tuple[int, ...], tuple[int, ...]]] = {
    "one": (1, 1, 1, (0, 1), ()),
    "tp2": (2, 2, 1, (1,), (1,)),
    "tp4": (4, 4, 1, (0,), (1,)),
    "pp2": (2, 1, 2, (0, 1), (1,)),
    "pp4": (4, 1, 4, (1,), (1,)),
    "dp2": (2, 1, 1, (0, 1, 2, 3), (1, 2, 3)),
    "dp4": (4, 1, 1, (1,), (2,)),
    "tp2_pp2": (4, 2, 2, (0, 1), (1,)),
    "tp2_dp2": (4, 2, 1, (1, 2, 3), (1, 2, 3)),
    "pp2_dp2": (4, 1, 2, (1,), (1,)),
    "tp2_pp2_dp2": (8, 2, 2, (1,), (1,)),
}

CASES = [
    (name, model, precision, stage)
    for name, (_, _, _, fp32, bf16) in LAYOUTS.items()
    for model in MODELS
    for precision, stages in (("fp32", fp32), ("bf16", bf16))
    for stage in stages
]
BOUND = {"fp32": 1e-4, "bf16": 1e-2}  # relative


@pytest.fixture(scope="module")
def reference(worlds: Worlds) -> Any:
    """`reference(model, precision, ...)`: the curves of one process, each computed once."""
    cache: dict[Any, Any] = {}

    def curve(model: str, precision: str, **changes: Any) -> Any:
        key = (model, precision, *changes.items())
        if key not in cache:
            tree = layout(MODELS[model], precision=precision, **changes)
            cache[key] = worlds.run(1, run_layout, tree, STEPS)[0]
        return cache[key]

    return curve


def micro_batch(world: int, tensor: int, pipeline: int) -> int:
    """Sequences per micro-batch: as many as possible, to save time, except in pipelines.

    The reference has four micro-batches of 2 sequences.
    """
    if pipeline > 1:
        return 2
    return 4 if world <= 2 else 8 * tensor // world


def assert_same(curves: Any, expected: Any, bound: float) -> None:
    for key in ("loss", "grad_norm", "validation"):
        np.testing.assert_allclose(curves[key], expected[key], rtol=bound, err_msg=key)
    assert not any(curves["skipped"])


def test_the_reference_loss_falls(reference: Any) -> None:
    """The tests below would also pass for a model that learns nothing."""
    for model in MODELS:
        loss = reference(model, "fp32")["loss"]
        assert loss[-1] < loss[0] - 0.1


@pytest.mark.parametrize(("name", "model", "precision", "stage"), CASES)
def test_same_curve(
    worlds: Worlds, reference: Any, name: str, model: str, precision: str, stage: int
) -> None:
    world, tensor, pipeline, _, _ = LAYOUTS[name]
    micro = micro_batch(world, tensor, pipeline)
    tree = layout(MODELS[model], tensor, pipeline, stage, precision, micro)
    curves = worlds.run(world, run_layout, tree, STEPS)
    for other in curves[1:]:
        assert other == curves[0]  # every rank reports the same
    assert_same(curves[0], reference(model, precision), BOUND[precision])


@pytest.mark.parametrize(
    ("model", "world", "tensor", "pipeline", "stage"),
    [
        ("paper", 2, 2, 1, 1),
        ("paper", 2, 1, 2, 1),
        ("paper", 2, 1, 1, 3),
        ("paper", 4, 2, 1, 2),
        ("by_level", 4, 2, 2, 1),
        ("by_level", 2, 2, 1, 1),
        ("by_level", 2, 1, 2, 1),
        ("by_level", 2, 1, 1, 3),
        ("by_level", 4, 2, 1, 2),
        ("paper", 4, 2, 2, 1),
    ],
)
def test_same_curve_with_dropout(
    worlds: Worlds,
    reference: Any,
    model: str,
    world: int,
    tensor: int,
    pipeline: int,
    stage: int,
) -> None:
    """Masks depend on (seed, step, sample, layer) only, also in recomputed blocks."""
    micro = micro_batch(world, tensor, pipeline)
    tree = layout(MODELS[model], tensor, pipeline, stage, micro=micro, dropout=0.1)
    tree["training"]["activation_checkpointing"] = [False, True, True][: 2 + (model == "by_level")]
    curves = worlds.run(world, run_layout, tree, STEPS)
    assert_same(curves[0], reference(model, "fp32", dropout=0.1), BOUND["fp32"])


@pytest.mark.parametrize(("world", "pipeline"), [(2, 2), (4, 4), (2, 1)])
def test_same_curve_with_shorten_factor_dropout(worlds: Worlds, world: int, pipeline: int) -> None:
    """The shorten factors, and with them the shapes at stage boundaries, change between steps."""
    changes: dict[str, Any] = {"shorten_factor_choices": [2, 3], "hierarchy": "1@1 4@2 1@1"}
    tree = layout(PAPER, 1, pipeline, 1, **changes)
    curves = worlds.run(world, run_layout, tree, STEPS)
    expected = worlds.run(1, run_layout, layout(PAPER, **changes), STEPS)[0]
    assert_same(curves[0], expected, BOUND["fp32"])
