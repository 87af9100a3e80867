"""Resuming after 10 of 20 steps: bit for bit in the same layout, the same curve in others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hg_scale.checkpoint.find import find_latest, folder_name
from hg_scale.checkpoint.load import read_parameters
from hg_scale.config.load import parse_config
from tests.training.models import BY_LEVEL, PAPER, build_engine, layout, local_batch, random_batch
from tests.world import Worlds

MODELS = {"paper": PAPER, "by_level": BY_LEVEL}
HALF, STEPS = 10, 20


def run_half(tree: dict[str, Any], folder: Path, first: int) -> dict[str, list[float]]:
    """Take ten steps from `first`, which is 1 or 11, in this world.

    From step 1: save after ten steps and take ten more. From step 11: resume from that checkpoint.
    """
    from hg_scale.training.state import TrainingProgress, load_state, save_state

    engine = build_engine(tree)
    progress = TrainingProgress()
    if first > 1:
        checkpoint = find_latest(folder)
        assert checkpoint is not None
        progress = load_state(engine, checkpoint)
        assert progress.step == first - 1
    results = []
    for step in range(first, first + HALF):
        results.append(engine.train_step(local_batch(engine, step), step, 1e-3))
        progress.step = step
    if first == 1:
        save_state(engine, folder, progress, engine.config)
        for step in range(HALF + 1, STEPS + 1):
            results.append(engine.train_step(local_batch(engine, step), step, 1e-3))
    return {"loss": [r.loss for r in results], "grad_norm": [r.grad_norm for r in results]}


# ((world size, tensor, pipeline, ZeRO stage), precision, layouts to resume in).
ONE = (1, 1, 1, 1)
WRITERS = {
    "dp2_zero3": ((2, 1, 1, 3), "fp32", [ONE, (2, 2, 1, 1), (2, 1, 2, 0)]),
    "tp2_pp2": ((4, 2, 2, 1), "bf16", [ONE, (2, 1, 1, 2), (2, 2, 1, 3)]),
}


@pytest.mark.parametrize(("model", "writer"), [("paper", "tp2_pp2"), ("by_level", "dp2_zero3")])
def test_a_resumed_run_has_the_curve_of_an_uninterrupted_one(
    worlds: Worlds, tmp_path: Path, model: str, writer: str
) -> None:
    (world, tensor, pipeline, zero), precision, others = WRITERS[writer]
    tree = layout(MODELS[model], tensor, pipeline, zero, precision)
    uninterrupted = worlds.run(world, run_half, tree, tmp_path, 1)[0]
    resumed = worlds.run(world, run_half, tree, tmp_path, HALF + 1)[0]
    for key, values in resumed.items():
        assert values == uninterrupted[key][HALF:]  # bit for bit
    bound = {"fp32": 1e-4, "bf16": 1e-2}[precision]
    for world, tensor, pipeline, zero in others:
        other = layout(MODELS[model], tensor, pipeline, zero, precision)
        curve = worlds.run(world, run_half, other, tmp_path, HALF + 1)[0]
        for key, values in curve.items():
            np.testing.assert_allclose(
                values,
                uninterrupted[key][HALF:],
                rtol=bound,
                err_msg=f"{key} in {other['parallel']}",
            )


def test_a_model_without_an_engine_loads_a_checkpoint(worlds: Worlds, tmp_path: Path) -> None:
    """A checkpoint's parameter names are those of the plain model, and its loss is the same."""
    from hg_scale.model.hourglass import Hourglass

    tree = layout(BY_LEVEL, 2, 2, 1)
    worlds.run(4, run_half, tree, tmp_path, 1)
    config = parse_config(tree)
    model = Hourglass(config.model, seed=None)
    model.load_state_dict(dict(read_parameters(tmp_path / folder_name(HALF))))
    batch = random_batch(config, HALF + 1)
    with torch.no_grad():
        loss = float(model(batch[:, :-1], batch[:, 1:]))
    expected = worlds.run(4, run_half, tree, tmp_path, HALF + 1)[0]["loss"][0]
    assert loss == pytest.approx(expected, rel=1e-5)
