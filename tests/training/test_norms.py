"""Norms of weights and updates by level: the same in every layout, and as computed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.training.models import BY_LEVEL, build_engine, layout, local_batch
from tests.world import Worlds

STEPS = 4
LOGGING = {"every": 1, "norms_every": 2}


def measure(tree: dict[str, Any]) -> list[dict[str, list[float]]]:
    """Return the norms of each step, in this world."""
    engine = build_engine(tree)
    steps = range(1, STEPS + 1)
    return [engine.train_step(local_batch(engine, step), step, 1e-3).norms for step in steps]


def measure_by_hand(tree: dict[str, Any]) -> list[list[list[float]]]:
    """Return [weight norms, update norms] by level of each step, on one rank without ZeRO."""
    from hg_scale.model.plan import layer_plan

    engine = build_engine(tree)
    inner = {1: [], 2: []}  # type: dict[int, list[str]]
    for layer in layer_plan(engine.config.model):
        if layer.level:
            inner[layer.level].append(layer.name + ".")
    found = []
    for step in range(1, STEPS + 1):
        before = {n: p.detach().clone() for n, p in engine.model.named_parameters()}
        engine.train_step(local_batch(engine, step), step, 1e-3)
        squares = np.zeros((2, 3))
        for name, after in engine.model.named_parameters():
            level = next((k for k, names in inner.items() if name.startswith(tuple(names))), 0)
            squares[0, level] += float(after.detach().double().square().sum())
            squares[1, level] += float((after.detach() - before[name]).double().square().sum())
        found.append(np.sqrt(squares).tolist())
    return found


@pytest.fixture(scope="module")
def by_hand(worlds: Worlds) -> list[list[list[float]]]:
    return worlds.run(1, measure_by_hand, layout(BY_LEVEL, zero=0))[0]


@pytest.mark.parametrize(
    ("world", "tensor", "pipeline", "zero", "precision"),
    [
        (1, 1, 1, 0, "fp32"),
        (2, 1, 1, 0, "fp32"),
        (2, 1, 1, 1, "bf16"),
        (2, 1, 1, 3, "fp32"),
        (2, 1, 2, 1, "fp32"),
        (4, 2, 1, 2, "fp32"),
        (4, 2, 2, 0, "fp32"),
        (4, 2, 2, 1, "bf16"),
    ],
)
def test_norms_are_the_same_in_every_layout(
    worlds: Worlds,
    by_hand: list[list[list[float]]],
    world: int,
    tensor: int,
    pipeline: int,
    zero: int,
    precision: str,
) -> None:
    tree = layout(BY_LEVEL, tensor, pipeline, zero, precision) | {"logging": LOGGING}
    ranks = worlds.run(world, measure, tree)
    assert all(rank == ranks[0] for rank in ranks)
    first, second, third, fourth = ranks[0]
    assert not first and not third
    for found, expected in ((second, by_hand[1]), (fourth, by_hand[3])):
        weights, updates = found["weight_norm_by_level"], found["update_norm_by_level"]
        assert min(updates) > 0
        np.testing.assert_allclose(weights, expected[0], rtol=1e-4)
        np.testing.assert_allclose(updates, expected[1], rtol=1e-3 if precision == "fp32" else 0.05)


def test_a_skipped_step_updates_nothing(worlds: Worlds) -> None:
    tree = layout(BY_LEVEL) | {"logging": LOGGING}
    assert worlds.run(1, skip_second, tree)[0] == [0.0, 0.0, 0.0]


def skip_second(tree: dict[str, Any]) -> list[float]:
    engine = build_engine(tree)
    for step in (1, 2):
        if step == 2:
            engine.guard.judge = lambda *_: "planted"
        result = engine.train_step(local_batch(engine, step), step, 1e-3)
    return result.norms["update_norm_by_level"]
