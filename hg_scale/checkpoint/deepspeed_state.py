"""Where DeepSpeed keeps fp32 weights and moments (its gradients: `training/gradients.py`).

`tests/checkpoint/test_deepspeed_state.py` is the contract: it names the attribute that moved when
a version changes. Tried with DeepSpeed 0.19.8.

- ZeRO 0: in the torch optimizer, for each parameter.
- ZeRO 1, 2 and BF16_Optimizer: each parameter group is one flat fp32 partition on each rank, and
  `parameter._hp_mapping` says which of a parameter's elements lie where in it (None: none here).
- ZeRO 3: a parameter's `ds_tensor` is its share of the flat parameter, padded; its fp32 master is
  a part of a sub-group's flat tensor, which `grad_position` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hg_scale.checkpoint.fragments import Fragment, Slice

Slices = dict[nn.Parameter, Slice]


@dataclass(frozen=True)
class LocalState:
    """One parameter's fragment on this rank, as flat views into DeepSpeed's own tensors."""

    parameter: nn.Parameter
    fragment: Fragment
    tensors: dict[str, Tensor]  # by kind, see fragments.KINDS

    def part(self, start: int, length: int) -> LocalState:
        """Elements [start, start + length) of the fragment."""
        piece = Fragment(self.fragment.slice, self.fragment.start + start, length)
        tensors = {kind: tensor.narrow(0, start, length) for kind, tensor in self.tensors.items()}
        return LocalState(self.parameter, piece, tensors)


def local_states(engine: Any, slices: Slices) -> Iterator[LocalState]:
    """The fp32 weights and moments that this rank holds, in the order of the parameters."""
    optimizer = engine.basic_optimizer
    for parameter, piece in slices.items():
        located = _locate(engine, parameter, piece)
        if located is None:
            continue
        flat, offset, start, length = located
        state = _adam_state(optimizer, flat)
        tensors = {
            kind: tensor.detach().flatten().narrow(0, offset, length)
            for kind, tensor in (("fp32", flat), *state.items())
            if kind != "step"
        }
        yield LocalState(parameter, Fragment(piece, start, length), tensors)


def _locate(engine: Any, parameter: Any, piece: Slice) -> tuple[Tensor, int, int, int] | None:
    """(optimizer's tensor, offset in it, start in the slice, length) of what this rank holds."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO 3
        zero = engine.optimizer
        group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
        start = padded * torch.distributed.get_rank(parameter.ds_process_group)
        length = min(padded, piece.size - start)
        flat = zero.fp32_partitioned_groups_flat[group]
        return (flat, offset, start, length) if length > 0 else None
    if hasattr(parameter, "_hp_mapping"):  # ZeRO 1, 2
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"][0]
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return flat, here.start, there.start, there.numel
    return parameter, 0, 0, piece.size


def _adam_state(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """The moments of one of the optimizer's tensors, made now where no step was taken yet."""
    state = optimizer.state[flat]
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        state["exp_avg"] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    return state


def optimizer_step(engine: Any) -> int:
    """How many steps the optimizer has taken; it skips those with gradients that overflow."""
    states = engine.basic_optimizer.state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def needed(engine: Any, slices: Slices) -> Iterator[tuple[str, Fragment]]:
    """What `load_states` reads: (kind, fragment)."""
    for parameter, located in _by_parameter(engine, slices):
        piece = slices[parameter]
        if _computes_with_all(parameter, piece):
            yield "fp32", Fragment(piece, 0, piece.size)
        elif located:
            yield "fp32", located.fragment
        if located:
            yield from ((kind, located.fragment) for kind in located.tensors if kind != "fp32")


@torch.no_grad()
def load_states(
    engine: Any, slices: Slices, read: Callable[[str, Fragment], Tensor], step: int
) -> None:
    """Set weights, moments and the optimizer's step count.

    `read(kind, fragment)` gives flat fp32 elements. The copies that the model computes with are
    each rounded from the same fp32 values as its master.
    """
    for parameter, local in _by_parameter(engine, slices):
        piece = slices[parameter]
        whole = mine = None
        if _computes_with_all(parameter, piece):
            whole = read("fp32", Fragment(piece, 0, piece.size))
            parameter.copy_(whole.view(parameter.shape))
        if local:
            fragment = local.fragment
            begin, end = fragment.start, fragment.end
            mine = read("fp32", fragment) if whole is None else whole[begin:end]
            local.tensors["fp32"].copy_(mine)
            for kind, tensor in local.tensors.items():
                if kind != "fp32":
                    tensor.copy_(read(kind, fragment))
        if mine is not None and hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.view(-1)[: mine.numel()].copy_(mine)
    for state in engine.basic_optimizer.state.values():
        if "step" in state:
            state["step"].fill_(step)


def _by_parameter(engine: Any, slices: Slices) -> Iterator[tuple[nn.Parameter, LocalState | None]]:
    """Every parameter with what this rank holds of its state; None: nothing."""
    held = {local.parameter: local for local in local_states(engine, slices)}
    return ((parameter, held.get(parameter)) for parameter in slices)


def _computes_with_all(parameter: nn.Parameter, piece: Slice) -> bool:
    """Whether this rank has the whole slice: always, but for ZeRO 3, which gathers it in a step.

    There `ds_tensor` is this rank's share, the same elements as those of its master.
    """
    return not hasattr(parameter, "ds_tensor") or parameter.numel() == piece.size
