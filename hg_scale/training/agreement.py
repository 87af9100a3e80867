"""What one rank meets ends all ranks: none is left waiting in a collective for one that is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from hg_scale.errors import UserError

_T = TypeVar("_T")


class StoppedByPeer(UserError):
    """This rank ends because another one met a fault, and that one tells it.

    Its `__cause__` is this rank's own fault, if it has one too.
    """


def run_on_all_ranks(action: Callable[[], _T], device: torch.device) -> _T:
    """What `action` returns here. Where it raises on any rank, whatever it is, all ranks raise."""
    fault: Exception | None = None
    result = None
    try:
        result = action()
    except (OSError, MemoryError) as error:
        told = str(error) or "no memory left on its host"
        fault = UserError(f"rank {dist.get_rank()}: {told}")
        fault.__cause__ = error
    except Exception as error:
        fault = error
    raise_on_all_ranks(fault, device)
    return result  # type: ignore[return-value]


def raise_on_all_ranks(fault: Exception | None, device: torch.device) -> None:
    """Raise on all ranks if one has an error: one reports its own, the others `StoppedByPeer`.

    A collective operation of all ranks.
    """
    flag = torch.tensor(error_flag(fault), device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    raise_flagged(int(flag), fault)


def error_flag(fault: Exception | None) -> int:
    """A number for this rank's fault; their maximum says which rank is to tell."""
    return dist.get_world_size() - dist.get_rank() if fault else 0


def raise_flagged(flag: int, fault: Exception | None) -> None:
    """Raise if the maximum of all ranks' flags says that one has a fault."""
    if flag:
        stop_all(fault, dist.get_world_size() - flag)


def stop_all(fault: Exception | None, teller: int) -> NoReturn:
    """Raise `fault` on the rank that is to tell it, and `StoppedByPeer` on the others."""
    if fault and dist.get_rank() == teller:
        raise fault
    raise StoppedByPeer(f"rank {teller} met a fault, and tells it") from fault
