"""The fp32 weights and Adam moments that this rank holds, as fragments to write and to fill.

Where DeepSpeed keeps them is the adapter's knowledge (`parallel/deepspeed_adapter.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hg_scale.checkpoint.fragments import Fragment, Slice
from hg_scale.checkpoint.rank_file import LocalState
from hg_scale.parallel.deepspeed_adapter import master_shard, partition, torch_optimizer

Slices = dict[nn.Parameter, Slice]


def local_states(engine: Any, slices: Slices) -> Iterator[LocalState]:
    """The fp32 weights and moments that this rank holds, in the order of the parameters."""
    optimizer = torch_optimizer(engine)
    for parameter, piece in slices.items():
        shard = master_shard(engine, parameter, piece.size)
        if shard is None:
            continue
        state = _adam_state(optimizer, shard.tensor)
        tensors = {
            kind: tensor.detach().flatten().narrow(0, shard.offset, shard.length)
            for kind, tensor in (("fp32", shard.tensor), *state.items())
            if kind != "step"
        }
        yield LocalState(parameter, Fragment(piece, shard.start, shard.length), tensors)


def _adam_state(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """The moments of one of the optimizer's tensors; created here if no step was taken yet."""
    state = optimizer.state[flat]
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        state["exp_avg"] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    return state


def optimizer_step(engine: Any) -> int:
    """The number of optimizer steps taken; steps with bad gradients are not among them."""
    states = torch_optimizer(engine).state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def required_fragments(engine: Any, slices: Slices) -> Iterator[tuple[str, Fragment]]:
    """What `load_states` reads: (kind, fragment)."""
    for parameter, local in _by_parameter(engine, slices):
        piece = slices[parameter]
        if _holds_full_slice(parameter, piece):
            yield "fp32", Fragment(piece, 0, piece.size)
        elif local:
            yield "fp32", local.fragment
        if local:
            yield from ((kind, local.fragment) for kind in local.tensors if kind != "fp32")


@torch.no_grad()
def load_states(
    engine: Any, slices: Slices, read: Callable[[str, Fragment], Tensor], step: int
) -> None:
    """Set weights, moments and the optimizer's step count.

    `read(kind, fragment)` returns flat fp32 elements. The low-precision weights are rounded from
    the same fp32 values as their masters.
    """
    for parameter, local in _by_parameter(engine, slices):
        piece = slices[parameter]
        full = master = None
        if _holds_full_slice(parameter, piece):
            full = read("fp32", Fragment(piece, 0, piece.size))
            parameter.copy_(full.view(parameter.shape))
        if local:
            fragment = local.fragment
            begin, end = fragment.start, fragment.end
            master = read("fp32", fragment) if full is None else full[begin:end]
            local.tensors["fp32"].copy_(master)
            for kind, tensor in local.tensors.items():
                if kind != "fp32":
                    tensor.copy_(read(kind, fragment))
        share = partition(parameter)
        if master is not None and share is not None:
            share.view(-1)[: master.numel()].copy_(master)
    for state in torch_optimizer(engine).state.values():
        if "step" in state:
            state["step"].fill_(step)


def _by_parameter(engine: Any, slices: Slices) -> Iterator[tuple[nn.Parameter, LocalState | None]]:
    """Every parameter with this rank's part of its state, if any."""
    held = {local.parameter: local for local in local_states(engine, slices)}
    return ((parameter, held.get(parameter)) for parameter in slices)


def _holds_full_slice(parameter: nn.Parameter, piece: Slice) -> bool:
    """Whether this rank holds the full slice: always, except under ZeRO 3, which gathers it.

    There `partition` is this rank's share: the same elements as those of its master.
    """
    return partition(parameter) is None or parameter.numel() == piece.size
