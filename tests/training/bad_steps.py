"""Training with bad steps injected on one rank, and the state that each rank has afterwards."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.training.models import build_engine, local_batch

Outcome = dict[str, Any]


def train_with_bad_steps(tree: dict[str, Any], steps: list[int], bad: dict[int, str]) -> Outcome:
    """Take `steps`, some of which are made bad.

    bad: by step, the kind of parameter whose gradient is NaN on the last rank ("sharded" over
    tensor ranks, "replicated" on them, or "tied" over stages), or "spike", which only the guard
    sees.
    """
    engine = build_engine(tree)
    judge = engine.guard.judge
    results = []
    for step in steps:
        kind, hook = bad.get(step), None
        if kind == "spike":
            engine.guard.judge = lambda *_: "a spike"
        elif kind and dist.get_rank() == dist.get_world_size() - 1:
            parameter = find_parameter(engine.slices, kind)
            hook = parameter.register_hook(lambda g: torch.full_like(g, math.nan))
        results.append(engine.train_step(local_batch(engine, step), step, 1e-3 / step))
        if hook:
            hook.remove()
        engine.guard.judge = judge
    state = dict(local_tensors(engine))
    return {
        "skipped": [result.skipped for result in results],
        "skipped_steps": engine.deepspeed.skipped_steps,
        "reasons": [result.skip_reason for result in results],
        "loss": [result.loss for result in results],
        "norm": [result.grad_norm for result in results],
        "finite": all(bool(tensor.isfinite().all()) for tensor in state.values()),
        "digests": {name: digest(tensor) for name, tensor in state.items()},
    }


def local_tensors(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """This rank's master weights, moments, compute weights and Adam's step count."""
    from hg_scale.checkpoint.local_state import local_states, optimizer_step

    yield "step", torch.tensor(optimizer_step(engine.deepspeed))
    for local in local_states(engine.deepspeed, engine.slices):
        for kind, tensor in local.tensors.items():
            yield f"{local.fragment.slice.name}/{kind}", tensor
    for parameter, piece in engine.slices.items():
        yield f"{piece.name}/compute", getattr(parameter, "ds_tensor", parameter).detach()


def digest(tensor: Tensor) -> str:
    """A hash of the bits of a tensor."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def find_parameter(slices: dict[nn.Parameter, Any], kind: str) -> nn.Parameter:
    """The last parameter of this rank that is "sharded", "replicated" or "tied"."""
    for parameter, piece in reversed(slices.items()):
        found = None
        if getattr(parameter, "ds_pipe_replicated", False):
            found = "tied"
        elif len(piece.shape) > 1:
            found = "sharded"
        elif piece.dim is None:
            found = "replicated"
        if found == kind:
            return parameter
    raise LookupError(kind)
