"""The processes that prepare one folder together.

MPI or Slurm say only who is who. All else goes through a folder that every process sees, so that
the same code serves `mpirun`, `srun` and a single process:

    rank-3.json   written by rank 3: how far it is, what went wrong, a count that shows it lives
    pulse.json    written by rank 0, read by the others: who belongs, which barrier is open, the
                  first failure
    claims/       an empty file a piece of work, created by the process that does it

A process that fails, or falls silent, ends the others with its message; none waits forever.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from hg_scale.data.errors import DataError
from hg_scale.data.lock import BEAT, FolderLock
from hg_scale.data.preparation.place import Place
from hg_scale.data.progress import ProgressBar

_Item = TypeVar("_Item")
TeamRecord = dict[str, Any]
_LEAVING = 10.0  # seconds that rank 0 waits at the end for the others to have left


class TeamStopped(DataError):
    """Another process of the team failed; the message is its."""


class Team:
    """This process among those that work in `folder`; a context manager, entered by all.

    Rank 0 holds the lock of the folder and shows the progress of all. `patience` is how many
    seconds a silent process is waited for before it is taken for dead.
    """

    def __init__(
        self, place: Place, folder: Path, *, patience: float, progress: ProgressBar
    ) -> None:
        self.rank, self.size = place.rank, place.size
        self._place, self._folder, self._patience = place, folder / "team", patience
        self._progress = progress
        self._lock = FolderLock(folder) if place.rank == 0 else None
        self._nonce = secrets.token_hex(8)
        self._members: list[str] = []  # nonces by rank, once all have come
        self._missing = ""  # who has not come yet
        self._barriers = 0  # reached by this process
        self._open = 0  # barriers that all have reached
        self._stage = 0  # number of the current one: barriers before it
        self._done = [0]  # bytes done here, by stage
        self._before = 0  # bytes of the current stage done by an earlier run
        self._beats = 0
        self._problem: DataError | None = None  # ends this process
        self._failed: str | None = None  # what this process tells the others
        self._left = False
        self._seen: dict[int, tuple[Any, float]] = {}  # by rank: its last count, and when it came
        self._exchanging = threading.Lock()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="team", daemon=True)

    # what the work uses

    @property
    def problem(self) -> DataError | None:
        """What ends this process, where it is no fault of its own work."""
        return self._problem

    def barrier(self) -> None:
        """Wait for all. Raises Stopped, with its message, where a process failed or is silent."""
        self._done.append(0)
        self._barriers += 1
        self._wait(lambda: self._open >= self._barriers)

    def stage(self, what: str, total: int, before: int) -> None:
        """Begin to count bytes up to `total`; `before` of them were done by an earlier run."""
        self._stage, self._before = self._barriers, before
        if self.rank == 0:
            self._progress.begin(what, total, before)

    def advance(self, count: int) -> None:
        """Count bytes of the stage. Raises Stopped where another process has failed."""
        self._done[self._stage] += count
        if self._problem:
            raise self._problem

    def share(self, items: Sequence[_Item], name: Callable[[_Item], str]) -> Iterator[_Item]:
        """The items that are this process's to do: each goes to one process, the next free."""
        first = self.rank * len(items) // self.size
        for item in [*items[first:], *items[:first]]:
            if self.size == 1 or self._claim(name(item)):
                yield item

    # coming and leaving

    def __enter__(self) -> Team:
        try:
            if self._lock:
                self._lock.acquire()
                self._clear()
            self._thread.start()
            if self.size > 1:
                self._join()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._leave.set()
        if self._thread.ident:
            self._thread.join()
        if error is None:
            self._left = True
        elif not isinstance(error, TeamStopped):
            interrupted = isinstance(error, KeyboardInterrupt)
            message = "interrupted" if interrupted else str(error) or type(error).__name__
            self._failed = f"{self._place}: {message}"
        if self._thread.ident:
            with suppress(OSError):
                self._exchange()
        if self._lock:
            if error is None:
                self._see_off()
            self._lock.release()

    def _clear(self) -> None:
        """Remove what an earlier run left; an orphan of it finds itself off the list and ends."""
        with suppress(FileNotFoundError):
            self._folder.rename(self._folder.with_name(f"team-{self._nonce}"))
        for folder in self._folder.parent.glob("team-*"):
            shutil.rmtree(folder, ignore_errors=True)
        (self._folder / "claims").mkdir(parents=True, exist_ok=True)

    def _join(self) -> None:
        """Meet the others: rank 0 takes down who came, the others wait to be on its list."""
        if self.rank == 0:
            self._missing = f"the other {self.size - 1} processes have not come"
            self._wait(self._all_came)
        else:
            self._missing = "rank 0 has not come"
            self._wait(self._is_listed())

    def _all_came(self) -> bool:
        came = {rank: self._read(f"rank-{rank}.json") for rank in range(1, self.size)}
        for rank, record in came.items():
            if record and record["size"] != self.size:
                raise DataError(
                    f"rank {rank} counts {record['size']} processes, rank 0 {self.size}: start all "
                    "with one mpirun or srun"
                )
        late = [str(rank) for rank, record in came.items() if not record]
        self._missing = f"rank {', '.join(late[:8])} of {self.size} has not come"
        if not late:
            self._members = [self._nonce, *(r["nonce"] for r in came.values() if r)]
        return not late

    def _is_listed(self) -> Callable[[], bool]:
        first: TeamRecord = {}

        def check() -> bool:
            pulse = self._read("pulse.json")
            if pulse is None:
                return False
            if self._member_of(pulse) == self._nonce:
                self._members = pulse["members"]
                return True
            first.update(first or pulse)
            if pulse["beat"] == first["beat"]:
                return False  # perhaps of an earlier run
            if pulse["failed"]:
                raise TeamStopped(pulse["failed"])
            if pulse["members"]:
                raise DataError(
                    f"another process is rank {self.rank} of {self.size} already; each needs a "
                    "rank of its own: start all with one mpirun or srun"
                )
            return False

        return check

    def _see_off(self) -> None:
        """Rank 0, after all is done: wait until the others need the folder no more."""
        until = time.monotonic() + _LEAVING
        for rank in range(1, self.size):
            while time.monotonic() < until:
                record = self._read(f"rank-{rank}.json")
                if record is None or record["left"]:
                    break
                time.sleep(0.01)

    # the exchange

    def _wait(self, ready: Callable[[], bool]) -> None:
        """Exchange until `ready()`."""
        pause, until = 0.005, time.monotonic() + self._patience
        while True:
            self._exchange()
            if self._problem:
                raise self._problem
            if ready():
                break
            if self.size > 1 and not self._members and time.monotonic() > until:
                raise DataError(
                    f"{self._missing} within {self._patience:g} s; start all processes with one "
                    "mpirun or srun, or raise --patience"
                )
            time.sleep(pause)
            pause = min(1.5 * pause, max(0.05, self.size / 256))
        self._exchange()

    def _keep_beating(self) -> None:
        trouble: float | None = None
        while not self._leave.wait(max(BEAT, self.size / 64)):
            try:
                self._exchange()
                if self._lock:
                    self._lock.beat()
                trouble = None
            except DataError as error:
                self._problem = self._problem or error
            except OSError as error:  # a shared file system may stumble
                trouble = trouble or time.monotonic()
                if time.monotonic() - trouble > self._patience:
                    self._problem = DataError(f"{self._folder}: cannot be used ({error.strerror})")

    def _exchange(self) -> None:
        """Say how far we are, and learn how far the others are."""
        with self._exchanging:
            self._beats += 1
            done = self._before + self._done[self._stage]
            if self.rank == 0:
                done += self._hear_all()
                self._progress.update(done)
            else:
                self._write_own()
                if self._members:
                    self._hear_first()

    def _hear_all(self) -> int:
        """Rank 0: read what the others wrote, and answer. The bytes of the stage they have done."""
        done, barriers = 0, [self._barriers]
        for rank in range(1, self.size if self._members else 0):
            record = self._read(f"rank-{rank}.json")
            ours = record is not None and record["nonce"] == self._members[rank]
            if not (record and record["left"]):
                self._check_alive(rank, record["beat"] if record and ours else None)
            barriers.append(record["barriers"] if record and ours else 0)
            if record and ours:
                done += record["done"][self._stage] if self._stage < len(record["done"]) else 0
                if record["failed"]:
                    self._problem = self._problem or TeamStopped(record["failed"])
        if self._members or self.size == 1:
            # What was open stays open: a second process of a rank may overwrite the first's file.
            self._open = max(self._open, min(barriers))
        if self.size > 1:
            problem = str(self._problem) if self._problem else None
            self._write("pulse.json", {
                "members": self._members, "beat": self._beats, "open": self._open,
                "failed": self._failed or problem,
            })  # fmt: skip
        return done

    def _hear_first(self) -> None:
        """The other ranks: read what rank 0 wrote."""
        pulse = self._read("pulse.json")
        if pulse is None or self._member_of(pulse) != self._nonce:
            self._problem = TeamStopped("another preparation of the same folder has taken over")
            return
        self._check_alive(0, pulse["beat"])
        self._open = pulse["open"]
        if pulse["failed"]:
            self._problem = self._problem or TeamStopped(pulse["failed"])

    def _check_alive(self, rank: int, count: int | None) -> None:
        now = time.monotonic()
        last, since = self._seen.setdefault(rank, (count, now))
        if count != last:
            self._seen[rank] = (count, now)
        elif now - since > self._patience:
            self._problem = self._problem or TeamStopped(
                f"rank {rank} of {self.size} has shown no sign of life for {self._patience:g} s; "
                "it may have been killed: start again to go on"
            )

    def _member_of(self, pulse: TeamRecord) -> str | None:
        members = pulse["members"]
        return members[self.rank] if self.rank < len(members) else None

    def _claim(self, name: str) -> bool:
        try:
            os.close(os.open(self._folder / "claims" / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def _write_own(self) -> None:
        self._write(f"rank-{self.rank}.json", {
            "nonce": self._nonce, "size": self.size, "beat": self._beats, "done": self._done,
            "barriers": self._barriers, "failed": self._failed, "left": self._left,
        })  # fmt: skip

    def _write(self, name: str, record: TeamRecord) -> None:
        for _ in range(3):  # rank 0 may be moving an earlier run's folder away
            with suppress(FileNotFoundError, FileExistsError):
                self._folder.mkdir(parents=True, exist_ok=True)
                partial = self._folder / f"{name}.{self._nonce}"
                partial.write_text(json.dumps(record))
                partial.replace(self._folder / name)
                return

    def _read(self, name: str) -> TeamRecord | None:
        with suppress(FileNotFoundError, ValueError):
            return json.loads((self._folder / name).read_text())
        return None
