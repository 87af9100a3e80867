"""A step whose gradients are not finite is skipped and counted, and leaves the weights alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hg_scale.config.load import parse_config
from tests.training.models import BY_LEVEL, layout, random_batch
from tests.world import Worlds


def poison_the_second_step(tree: dict[str, Any]) -> list[tuple[float, float, bool]]:
    """Four steps on the same batch; the logits of the second are infinite."""
    from hg_scale.parallel.mesh import make_mesh
    from hg_scale.training.engine import make_engine

    config = parse_config(tree, world_size=dist.get_world_size())
    mesh, parts = make_mesh(config.parallel)
    engine = make_engine(config, mesh, parts, torch.device("cpu"))
    rows = slice(mesh.data_rank * engine.rows, (mesh.data_rank + 1) * engine.rows)
    reads = mesh.is_first_stage or mesh.is_last_stage
    batch = random_batch(config, 1)[rows] if reads else None
    head = dict(engine.model.named_modules()).get("head.linear")
    results = []
    for step in range(1, 5):
        hook = None
        if step == 2 and head is not None:
            hook = head.register_forward_hook(lambda _, __, y: y * math.inf)
        results.append(engine.train_step(batch, step, 1e-3))
        if hook:
            hook.remove()
    return [(r.loss, r.grad_norm, r.skipped) for r in results]


@pytest.mark.parametrize(
    ("world", "pipeline", "stage", "precision"),
    [(1, 1, 0, "fp32"), (2, 1, 0, "fp32"), (2, 2, 0, "fp32"), (2, 1, 1, "fp32"), (2, 1, 1, "bf16"),
     (2, 1, 3, "bf16"), (2, 2, 1, "bf16")],
)  # fmt: skip
def test_it_is_skipped_and_counted(
    worlds: Worlds, world: int, pipeline: int, stage: int, precision: str
) -> None:
    tree = layout(BY_LEVEL, 1, pipeline, stage, precision)
    for results in worlds.run(world, poison_the_second_step, tree):
        losses, _, skipped = zip(*results, strict=True)
        assert skipped == (False, True, False, False)
        assert losses[0] > losses[2] > losses[3] > 0
        assert not math.isfinite(losses[1])
