"""Training with a fault planted on one rank, and what is left of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hg_scale.config.load import parse_config
from tests.training.models import random_batch

Outcome = dict[str, Any]


def train_with(tree: dict[str, Any], steps: list[int], faults: dict[int, str]) -> Outcome:
    """Take `steps`, with a fault in some of them.

    Faults are NaN in the last rank's gradient of a parameter that is `cut` over tensor ranks or
    `alike` on them or `tied` over stages; or `spike`, which only the guard sees.
    """
    from hg_scale.parallel.mesh import make_mesh
    from hg_scale.training.engine import make_engine

    config = parse_config(tree, world_size=dist.get_world_size())
    mesh, parts = make_mesh(config.parallel)
    engine = make_engine(config, mesh, parts, torch.device("cpu"))
    rows = engine.local_samples
    reads = mesh.is_first_stage or mesh.is_last_stage
    judge = engine.guard.judge
    results = []
    for step in steps:
        batch = random_batch(config, step)[rows] if reads else None
        fault, hook = faults.get(step), None
        if fault == "spike":
            engine.guard.judge = lambda *_: "a spike"
        elif fault and dist.get_rank() == dist.get_world_size() - 1:
            hook = find(engine.slices, fault).register_hook(lambda g: torch.full_like(g, math.nan))
        results.append(engine.train_step(batch, step, 1e-3 / step))
        if hook:
            hook.remove()
        engine.guard.judge = judge
    held = dict(held_here(engine))
    return {
        "skipped": [result.skipped for result in results],
        "counted": engine.deepspeed.skipped_steps,
        "why": [result.skip_reason for result in results],
        "loss": [result.loss for result in results],
        "norm": [result.grad_norm for result in results],
        "finite": all(bool(tensor.isfinite().all()) for tensor in held.values()),
        "held": {name: digest(tensor) for name, tensor in held.items()},
    }


def held_here(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Weights, moments, the copies computed with, and Adam's count of steps, of this rank."""
    from hg_scale.checkpoint.local_state import local_states, optimizer_step

    yield "step", torch.tensor(optimizer_step(engine.deepspeed))
    for local in local_states(engine.deepspeed, engine.slices):
        for kind, tensor in local.tensors.items():
            yield f"{local.fragment.slice.name}/{kind}", tensor
    for parameter, piece in engine.slices.items():
        yield f"{piece.name}/used", getattr(parameter, "ds_tensor", parameter).detach()


def digest(tensor: Tensor) -> str:
    """Equal where the bits are."""
    bits = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(bits).hexdigest()


def find(slices: dict[nn.Parameter, Any], fault: str) -> nn.Parameter:
    """The last parameter of this rank of a kind."""
    for parameter, piece in reversed(slices.items()):
        tied = getattr(parameter, "ds_pipe_replicated", False)
        matrix = len(piece.shape) > 1
        kind = "tied" if tied else "cut" if matrix else "alike" if piece.dim is None else None
        if kind == fault:
            return parameter
    raise LookupError(fault)
