"""How a rank ends that cannot go on: by its own fault, or since others are gone.

All ranks end then, and the launcher takes the highest exit code, so a rank that lost the others
has to find out why: a fault of another's own is not mended by starting again. A rank with such a
fault leaves `RUN/ranks/rank-00003.end` behind, before it closes its connections.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hg_scale.errors import UserError
from hg_scale.exit_codes import FAILED, LOST, starts_again
from hg_scale.parallel.launch import Launch
from hg_scale.parallel.runtime_errors import connection_error, gpu_error, out_of_memory
from hg_scale.training.agreement import StoppedByPeer

if TYPE_CHECKING:
    from hg_scale.training.interruption import Interruption

_PATIENCE = 5.0  # seconds in which a peer's fault may become visible on a shared disk


class LostRank(UserError):
    """This rank cannot reach the others any more, or its GPU."""

    exit_code = LOST


class OutOfMemory(UserError):
    """This rank's memory does not hold what it is to compute; the others do not know of it yet."""


class RankEnd(NamedTuple):
    """How a rank ended: the exit code, and why in a line."""

    rank: int
    code: int
    line: str


def clear_end(folder: Path, rank: int) -> None:
    """Forget how this rank ended last time. Raises OSError."""
    _path(folder, rank).unlink(missing_ok=True)


def write_end(folder: Path, rank: int, code: int, line: str) -> None:
    """Say that this rank ends by a fault of its own; on a disk that cannot be written, nothing."""
    path = _path(folder, rank)
    temporary = path.with_suffix(".end.tmp")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"code": code, "line": line}) + "\n")
        os.replace(temporary, path)


def error_of_peer(
    folder: Path, rank: int, world_size: int, patience: float = _PATIENCE
) -> RankEnd | None:
    """The fault of another rank for which the job is not to be started again.

    Waits up to `patience` seconds for one.
    """
    end = time.monotonic() + patience
    while True:
        for other in range(world_size):
            if other != rank and (found := _read(folder, other)):
                return found
        if time.monotonic() >= end:
            return None
        time.sleep(0.1)


def _read(folder: Path, rank: int) -> RankEnd | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads(_path(folder, rank).read_text())
        if not starts_again(int(told["code"])):
            return RankEnd(rank, int(told["code"]), str(told["line"]))
    return None


def _path(folder: Path, rank: int) -> Path:
    return folder / "ranks" / f"rank-{rank:05}.end"


def as_user_error(error: Exception, launch: Launch, interruption: Interruption) -> UserError | None:
    """An error as a person is told it; None where that needs a traceback."""
    gpu = gpu_error(error)
    if why := gpu or connection_error(error):
        what = f"its GPU on {socket.gethostname()}" if gpu else "its connection to the others"
        when = _when(interruption)
        return LostRank(
            f"rank {launch.rank} lost {what} {when}: {why}; the job is to be started again"
        )
    if isinstance(error, UserError):
        return error
    if lack := out_of_memory(error):
        return OutOfMemory(
            f"rank {launch.rank} has not enough memory {_when(interruption)}: {lack}; choose a "
            "smaller training.micro_batch_size, training.activation_checkpointing=true, a higher "
            "parallel.zero_stage, or more parallel.tensor or parallel.pipeline"
        )
    if interruption.signals.received and interruption.step is None:
        # Slurm signals all that belongs to a job, compilers too.
        return LostRank(
            f"rank {launch.rank} was interrupted by {interruption.signals} at the start "
            f"({type(error).__name__}); the job is to be started again"
        )
    return None


def _when(interruption: Interruption) -> str:
    step = interruption.step
    return "at the start" if step is None else f"at step {step + 1}"


def report_failure(fault: UserError, folder: Path, launch: Launch) -> int:
    """Say what ended the run, where that is this rank's to say; the exit code."""
    if isinstance(fault, StoppedByPeer):
        return exit_code_of(fault.__cause__)
    if not isinstance(fault, LostRank):
        print(fault, file=sys.stderr)
        return fault.exit_code
    met = error_of_peer(folder, launch.rank, launch.world_size)
    if met is None:
        print(fault, file=sys.stderr)
        return fault.exit_code
    if launch.rank == (1 if met.rank == 0 else 0):  # one is enough
        print(f"rank {met.rank} ended by itself, and all with it: {met.line}", file=sys.stderr)
    return met.code


def exit_code_of(fault: BaseException | None) -> int:
    """The exit code of a rank that met this, and ends since another one met a fault too."""
    return fault.exit_code if isinstance(fault, UserError) else FAILED
