"""An error on one rank ends all ranks: none waits in a collective for a rank that has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from hg_scale.errors import UserError

_T = TypeVar("_T")


class StoppedByPeer(UserError):
    """This rank ends because another rank has an error, which that rank reports.

    Its `__cause__` is this rank's own error, if it has one too.
    """


def run_on_all_ranks(action: Callable[[], _T], device: torch.device) -> _T:
    """Return what `action` returns on this rank; if it raises on any rank, raise on all.

    A collective. An OSError or MemoryError becomes a UserError that names the rank.
    """
    failure: Exception | None = None
    result = None
    try:
        result = action()
    except (OSError, MemoryError) as error:
        failure = UserError(f"rank {dist.get_rank()}: {str(error) or 'out of host memory'}")
        failure.__cause__ = error
    except Exception as error:
        failure = error
    raise_on_all_ranks(failure, device)
    return result  # type: ignore[return-value]


def raise_on_all_ranks(error: Exception | None, device: torch.device) -> None:
    """Raise on all ranks if one has an error: one reports its own, the others `StoppedByPeer`.

    A collective.
    """
    flag = torch.tensor(error_flag(error), device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    raise_flagged(int(flag), error)


def error_flag(error: Exception | None) -> int:
    """A number for this rank's error; the maximum over all ranks identifies who reports."""
    return dist.get_world_size() - dist.get_rank() if error else 0


def raise_flagged(flag: int, error: Exception | None) -> None:
    """Raise if the maximum of all ranks' flags says that one has an error."""
    if flag:
        stop_all(error, reporting_rank=dist.get_world_size() - flag)


def stop_all(error: Exception | None, reporting_rank: int) -> NoReturn:
    """Raise `error` on the rank that reports it, and `StoppedByPeer` on the others."""
    if error and dist.get_rank() == reporting_rank:
        raise error
    raise StoppedByPeer(f"rank {reporting_rank} reports an error") from error
