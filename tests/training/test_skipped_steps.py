"""All ranks skip and count a bad step, which changes neither weights nor optimizer state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch.distributed as dist

from tests.training.bad_steps import train_with_bad_steps
from tests.training.models import BY_LEVEL, PAPER, build_engine, layout, local_batch
from tests.world import Worlds

# (tensor, pipeline, data, ZeRO stage, precision)
LAYOUTS = [
    (1, 1, 2, 0, "fp32"), (1, 1, 2, 1, "fp32"), (1, 1, 2, 3, "fp32"),
    (1, 1, 2, 1, "bf16"), (1, 1, 2, 3, "bf16"),
    *(pytest.param(1, 1, 2, 2, p, marks=pytest.mark.slow) for p in ("fp32", "bf16")),  # as stage 1
    (1, 2, 1, 0, "fp32"), (1, 2, 1, 1, "fp32"), (1, 2, 1, 1, "bf16"),
    (2, 1, 1, 0, "fp32"), (2, 1, 1, 1, "bf16"), (2, 1, 2, 3, "bf16"), (2, 2, 1, 1, "bf16"),
]  # fmt: skip
BAD = {1: "spike", 3: "sharded", 5: "replicated", 7: "tied"}
"""Kinds of bad steps by step. A bad first step must not create moments."""
STEPS = list(range(1, 9))


@pytest.mark.parametrize(("tensor", "pipeline", "data", "stage", "precision"), LAYOUTS)
def test_bad_steps_leave_no_trace(
    worlds: Worlds, tensor: int, pipeline: int, data: int, stage: int, precision: str
) -> None:
    """Weights, moments and Adam's count are those of a run without these steps, bit for bit."""
    world, tree = tensor * pipeline * data, layout(PAPER, tensor, pipeline, stage, precision)
    bad = {step: kind for step, kind in BAD.items() if kind != "tied" or pipeline > 1}
    good = [step for step in STEPS if step not in bad]
    without = worlds.run(world, train_with_bad_steps, tree, good, {})
    ranks = worlds.run(world, train_with_bad_steps, tree, STEPS, bad)
    reasons = ranks[0]["reasons"]
    assert [step for step, reason in zip(STEPS, reasons, strict=True) if reason] == list(bad)
    for rank, (found, expected) in enumerate(zip(ranks, without, strict=True)):
        assert found["finite"], rank
        assert found["skipped_steps"] == len(bad)
        assert found["reasons"] == reasons and found["loss"] == ranks[0]["loss"]
        for key in ("loss", "norm"):
            assert [found[key][step - 1] for step in good] == expected[key]
        digests = expected["digests"]
        assert not [name for name in digests if found["digests"][name] != digests[name]]
    for step in bad:
        reason = reasons[step - 1]
        if bad[step] == "spike":
            assert reason == "a spike"
        else:  # names the last rank, or all ranks that hold the reduced gradient
            assert reason.startswith("gradients of 1 tensor are not finite: ")
            assert f"{world - 1})" in reason or data > 1
    if tensor == 2 and data == 1:  # DeepSpeed's norm would include tensor rank 0 only
        assert f"(rank {world - 1})" in reasons[4]


def train_with_infinite_logits(tree: dict[str, Any]) -> list[tuple[float, str | None]]:
    """Four steps on the same batch; the logits of the second are infinite on the last rank."""
    engine = build_engine(tree)
    batch = local_batch(engine, 1)
    last_stage = engine.mesh.is_last_stage
    head = dict(engine.model.named_modules())["head.linear"] if last_stage else None
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
def test_a_step_whose_loss_is_not_finite_is_skipped(
    worlds: Worlds, world: int, pipeline: int, stage: int, precision: str
) -> None:
    tree = layout(BY_LEVEL, 1, pipeline, stage, precision)
    for results in worlds.run(world, train_with_infinite_logits, tree):
        losses, reasons = zip(*results, strict=True)
        assert [reason is None for reason in reasons] == [True, False, True, True]
        assert losses[0] > losses[2] > losses[3] > 0
        assert not math.isfinite(losses[1])
        assert reasons[1].startswith(f"the loss is nan on rank {world - 1}; gradients of ")
