"""Stop after 10 of 20 steps and go on: bit for bit in the same layout, the same curve in others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hg_scale.checkpoint.find import find_latest, folder_name
from hg_scale.checkpoint.load import read_parameters
from hg_scale.config.load import parse_config
from tests.training.models import BY_LEVEL, PAPER, layout, random_batch
from tests.world import Worlds

MODELS = {"paper": PAPER, "by_level": BY_LEVEL}
HALF, STEPS = 10, 20


def run_half(tree: dict[str, Any], folder: Path, first: int) -> dict[str, list[float]]:
    """Steps `first` .. `first` + 9 in this world; begins from the folder's checkpoint, saves."""
    from hg_scale.parallel.mesh import make_mesh
    from hg_scale.training.engine import make_engine
    from hg_scale.training.state import TrainingProgress, load_state, save_state

    config = parse_config(tree, world_size=dist.get_world_size())
    mesh, parts = make_mesh(config.parallel)
    engine = make_engine(config, mesh, parts, torch.device("cpu"))
    progress = TrainingProgress()
    if first > 1:
        checkpoint = find_latest(folder)
        assert checkpoint is not None
        progress = load_state(engine, checkpoint)
        assert progress.step == first - 1
    results = []
    for step in range(first, first + HALF):
        rows = engine.local_samples
        reads = mesh.is_first_stage or mesh.is_last_stage
        batch = random_batch(config, step)[rows] if reads else None
        results.append(engine.train_step(batch, step, 1e-3))
        progress.step = step
    if first == 1:
        save_state(engine, folder, progress, config)
        # Saving disturbs nothing: the curve goes on from here too.
        for step in range(HALF + 1, STEPS + 1):
            rows = slice(
                mesh.data_rank * engine.local_batch_size,
                (mesh.data_rank + 1) * engine.local_batch_size,
            )
            reads = mesh.is_first_stage or mesh.is_last_stage
            batch = random_batch(config, step)[rows] if reads else None
            results.append(engine.train_step(batch, step, 1e-3))
    return {"loss": [r.loss for r in results], "grad_norm": [r.grad_norm for r in results]}


# (world size, tensor, pipeline, ZeRO stage, precision), and three other layouts to go on in.
ONE = (1, 1, 1, 1)
WRITERS = {
    "dp2_zero3": ((2, 1, 1, 3), "fp32", [ONE, (2, 2, 1, 1), (2, 1, 2, 0)]),
    "tp2_pp2": ((4, 2, 2, 1), "bf16", [ONE, (2, 1, 1, 2), (2, 2, 1, 3)]),
}


@pytest.mark.parametrize(("model", "writer"), [("paper", "tp2_pp2"), ("by_level", "dp2_zero3")])
def test_resume(worlds: Worlds, tmp_path: Path, model: str, writer: str) -> None:
    (world, tensor, pipeline, zero), precision, others = WRITERS[writer]
    tree = layout(MODELS[model], tensor, pipeline, zero, precision)
    undisturbed = worlds.run(world, run_half, tree, tmp_path, 1)[0]
    again = worlds.run(world, run_half, tree, tmp_path, HALF + 1)[0]
    for key, values in again.items():
        assert values == undisturbed[key][HALF:]  # bit for bit
    bound = {"fp32": 1e-4, "bf16": 1e-2}[precision]
    for world, tensor, pipeline, zero in others:
        other = layout(MODELS[model], tensor, pipeline, zero, precision)
        curve = worlds.run(world, run_half, other, tmp_path, HALF + 1)[0]
        for key, values in curve.items():
            np.testing.assert_allclose(
                values, undisturbed[key][HALF:], rtol=bound, err_msg=f"{key} in {other['parallel']}"
            )


def test_the_plain_model_has_the_trained_weights(worlds: Worlds, tmp_path: Path) -> None:
    """Evaluation needs no engine: a checkpoint's weights by name fit the plain model."""
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
