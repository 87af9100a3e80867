"""How a rank ends after an error of its own, or after another rank has ended.

An error on one rank ends all ranks, and the launcher returns the highest exit code. A rank that
loses its connection must therefore find out why: if another rank ended with an error of its own,
starting the job again would not fix it. A rank with such an error writes
`RUN/ranks/rank-00003.end` before it closes its connections.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hg_scale.atomic_write import write_json
from hg_scale.errors import UserError
from hg_scale.exit_codes import FAILED, INTERRUPTED, LOST, starts_again
from hg_scale.parallel.launch import Launch
from hg_scale.parallel.runtime_errors import connection_error, gpu_error, out_of_memory
from hg_scale.training.agreement import StoppedByPeer

if TYPE_CHECKING:
    from hg_scale.training.interruption import Interruption

_PEER_TIMEOUT = 5.0  # seconds until a peer's file is visible on a shared file system


class LostRank(UserError):
    """This rank lost its connection to the other ranks, or its GPU."""

    exit_code = LOST


class Interrupted(UserError):
    """Ctrl-C ended this rank before it could save."""

    exit_code = INTERRUPTED


class OutOfMemory(UserError):
    """This rank ran out of memory; the other ranks do not know it yet."""


class RankEnd(NamedTuple):
    """How a rank ended: its exit code and the reason in one line."""

    rank: int
    code: int
    line: str


def find_ends(folder: Path) -> frozenset[tuple[str, int, int]]:
    """Identify the present end files, to tell those of an earlier start from new ones.

    They are not removed before the folder is locked: they may be those of a run that has it.
    """
    found = set()
    for path in (folder / "ranks").glob("rank-*.end"):
        with suppress(OSError):
            found.add(_identify(path))
    return frozenset(found)


def _identify(path: Path) -> tuple[str, int, int]:
    state = path.stat()
    return path.name, state.st_ino, state.st_mtime_ns


def write_end(folder: Path, rank: int, code: int, line: str) -> None:
    """Record that this rank ends with an error of its own; ignore a disk that is not writable."""
    path = _path(folder, rank)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"code": code, "line": line})


def error_of_peer(
    folder: Path,
    rank: int,
    world_size: int,
    timeout: float = _PEER_TIMEOUT,
    earlier: frozenset[tuple[str, int, int]] = frozenset(),
) -> RankEnd | None:
    """Return the end of another rank whose exit code forbids starting the job again, or None.

    Waits up to `timeout` seconds for the file of such a rank. `earlier`: files to ignore, of
    `find_ends`.
    """
    end = time.monotonic() + timeout
    while True:
        for other in range(world_size):
            if other != rank and (found := _read(folder, other, earlier)):
                return found
        if time.monotonic() >= end:
            return None
        time.sleep(0.1)


def _read(folder: Path, rank: int, earlier: frozenset[tuple[str, int, int]]) -> RankEnd | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        path = _path(folder, rank)
        record = json.loads(path.read_text())
        if not starts_again(int(record["code"])) and _identify(path) not in earlier:
            return RankEnd(rank, int(record["code"]), str(record["line"]))
    return None


def _path(folder: Path, rank: int) -> Path:
    return folder / "ranks" / f"rank-{rank:05}.end"


def as_user_error(error: Exception, launch: Launch, interruption: Interruption) -> UserError | None:
    """Return the error to report in one line; None if the error is a bug and needs a traceback."""
    gpu = gpu_error(error)
    if why := gpu or connection_error(error):
        what = f"its GPU on {socket.gethostname()}" if gpu else "its connection to the others"
        when = _when(interruption)
        return LostRank(
            f"rank {launch.rank} lost {what} {when}: {why}; the job is to be started again"
        )
    if isinstance(error, UserError):
        return error
    if why := out_of_memory(error):
        return OutOfMemory(
            f"rank {launch.rank} ran out of memory {_when(interruption)}: {why}; choose a "
            "smaller training.micro_batch_size, training.activation_checkpointing=true, a higher "
            "parallel.zero_stage, or more parallel.tensor or parallel.pipeline"
        )
    if interruption.signals.received and interruption.step is None:
        # Slurm signals every process of a job, also compilers that this one has started.
        return LostRank(
            f"rank {launch.rank} was interrupted by {interruption.signals} during start-up "
            f"({type(error).__name__}); the job is to be started again"
        )
    return None


def _when(interruption: Interruption) -> str:
    step = interruption.step
    return "during start-up" if step is None else f"at step {step + 1}"


def report_failure(
    error: UserError,
    folder: Path,
    launch: Launch,
    earlier: frozenset[tuple[str, int, int]] = frozenset(),
) -> RankEnd:
    """Print why the run ended, unless another rank does; return whose error it was, and the code.

    `earlier`: as in `error_of_peer`.
    """
    own = RankEnd(launch.rank, error.exit_code, str(error))
    if isinstance(error, StoppedByPeer):
        return own._replace(code=_exit_code_of(error.__cause__))
    if not isinstance(error, LostRank):
        print(error, file=sys.stderr)
        return own
    peer = error_of_peer(folder, launch.rank, launch.world_size, earlier=earlier)
    if peer is None:
        print(error, file=sys.stderr)
        return own
    if launch.rank == (1 if peer.rank == 0 else 0):  # only one rank reports it
        print(f"rank {peer.rank} failed and ended all ranks: {peer.line}", file=sys.stderr)
    return peer


def _exit_code_of(error: BaseException | None) -> int:
    """Return the exit code of a rank stopped by a peer; `error`: its own error, if it has one."""
    return error.exit_code if isinstance(error, UserError) else FAILED
