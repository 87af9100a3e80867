"""A bad step is skipped and counted on all ranks alike, and leaves nothing behind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hg_scale.config.load import parse_config
from tests.training.bad_steps import train_with
from tests.training.models import BY_LEVEL, PAPER, layout, random_batch
from tests.world import Worlds

# (tensor, pipeline, data, ZeRO stage, precision)
LAYOUTS = [
    (1, 1, 2, 0, "fp32"), (1, 1, 2, 1, "fp32"), (1, 1, 2, 3, "fp32"),
    (1, 1, 2, 1, "bf16"), (1, 1, 2, 3, "bf16"),
    *(pytest.param(1, 1, 2, 2, p, marks=pytest.mark.slow) for p in ("fp32", "bf16")),  # as stage 1
    (1, 2, 1, 0, "fp32"), (1, 2, 1, 1, "fp32"), (1, 2, 1, 1, "bf16"),
    (2, 1, 1, 0, "fp32"), (2, 1, 1, 1, "bf16"), (2, 1, 2, 3, "bf16"), (2, 2, 1, 1, "bf16"),
]  # fmt: skip
FAULTS = {1: "spike", 3: "cut", 5: "alike", 7: "tied"}
"""By step. A bad first one must not make what the first step makes, such as moments."""
STEPS = list(range(1, 9))


@pytest.mark.parametrize(("tensor", "pipeline", "data", "stage", "precision"), LAYOUTS)
def test_as_if_they_had_not_been(
    worlds: Worlds, tensor: int, pipeline: int, data: int, stage: int, precision: str
) -> None:
    """Weights, moments and Adam's count are those of a run without these steps, bit for bit."""
    world, tree = tensor * pipeline * data, layout(PAPER, tensor, pipeline, stage, precision)
    faults = {s: fault for s, fault in FAULTS.items() if fault != "tied" or pipeline > 1}
    good = [step for step in STEPS if step not in faults]
    without = worlds.run(world, train_with, tree, good, {})
    ranks = worlds.run(world, train_with, tree, STEPS, faults)
    for rank, (met, expected) in enumerate(zip(ranks, without, strict=True)):
        assert met["finite"], rank
        assert met["counted"] == len(faults)
        assert [step for step, why in zip(STEPS, met["why"], strict=True) if why] == list(faults)
        assert met["why"] == ranks[0]["why"] and met["loss"] == ranks[0]["loss"]
        for figure in ("loss", "norm"):
            assert [met[figure][step - 1] for step in good] == expected[figure]
        assert not [name for name, bits in expected["held"].items() if met["held"][name] != bits]
    for step in faults:
        why = ranks[0]["why"][step - 1]
        if faults[step] == "spike":
            assert why == "a spike"
        else:  # that rank, or all that hold the sum
            assert why.startswith("gradients of 1 tensor are not finite: ")
            assert f"{world - 1})" in why or data > 1
    if tensor == 2 and data == 1:  # where DeepSpeed looks at the first of the tensor ranks alone
        assert f"(rank {world - 1})" in ranks[0]["why"][4]


def poison_the_second_step(tree: dict[str, Any]) -> list[tuple[float, str | None]]:
    """Four steps on the same batch; the logits of the second are infinite on the last rank."""
    from hg_scale.parallel.mesh import make_mesh
    from hg_scale.training.engine import make_engine

    config = parse_config(tree, world_size=dist.get_world_size())
    mesh, parts = make_mesh(config.parallel)
    engine = make_engine(config, mesh, parts, torch.device("cpu"))
    rows = engine.local_samples
    reads = mesh.is_first_stage or mesh.is_last_stage
    batch = random_batch(config, 1)[rows] if reads else None
    head = dict(engine.model.named_modules())["head.linear"] if mesh.is_last_stage else None
    results = []
    for step in range(1, 5):
        hook = None
        if step == 2 and head is not None and dist.get_rank() == dist.get_world_size() - 1:
            hook = head.register_forward_hook(lambda _, __, y: y * math.inf)
        results.append(engine.train_step(batch, step, 1e-3))
        if hook:
            hook.remove()
    return [(r.loss, r.skip_reason) for r in results]


@pytest.mark.parametrize(
    ("world", "pipeline", "stage", "precision"),
    [(1, 1, 0, "fp32"), (2, 1, 0, "fp32"), (2, 2, 0, "fp32"), (2, 1, 1, "fp32"), (2, 1, 1, "bf16"),
     (2, 1, 3, "bf16"), (2, 2, 1, "bf16")],
)  # fmt: skip
def test_a_loss_that_is_not_finite(
    worlds: Worlds, world: int, pipeline: int, stage: int, precision: str
) -> None:
    tree = layout(BY_LEVEL, 1, pipeline, stage, precision)
    for results in worlds.run(world, poison_the_second_step, tree):
        losses, whys = zip(*results, strict=True)
        assert [why is None for why in whys] == [True, False, True, True]
        assert losses[0] > losses[2] > losses[3] > 0
        assert not math.isfinite(losses[1])
        assert whys[1].startswith(f"the loss is nan on rank {world - 1}; gradients of ")
