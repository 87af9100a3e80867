"""The ranks that prepare one folder together.

The launcher's variables only tell a process its rank. All communication goes through a folder that
every rank sees, so the same code serves `mpirun`, `srun` and a single process, without MPI:

    rank-3.json   written by rank 3: its progress, its error, a count that shows that it is alive
    rank-0.json   written by rank 0, read by the others: the members, the number of open barriers,
                  the first error
    claims/       an empty file per work item, created by the rank that takes it

A rank that fails, or stops counting, ends the others with its message; no rank waits forever.
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

from hg_scale.atomic_write import write_json
from hg_scale.data.errors import DataError
from hg_scale.data.progress import ProgressBar
from hg_scale.folder_lock import BEAT, FolderLock, PeriodicThread
from hg_scale.parallel.launch import Launch

_Item = TypeVar("_Item")
_Record = dict[str, Any]  # content of a rank's file

_EXIT_WAIT = 10.0  # seconds that rank 0 waits at the end for the other ranks to leave
_ADVICE = (
    "is writing there; wait for it or end it. If several processes were started to work together, "
    "they do not see each other: start them with one mpirun or srun"
)


class OtherRankFailed(DataError):
    """Another rank failed; the message is that rank's."""


class RankGroup:
    """This process as one of the ranks that work in `folder`; a context manager, entered by all.

    Rank 0 holds the lock of the folder and shows the progress of all ranks. A rank whose count
    has not advanced for `patience` seconds is considered dead.
    """

    def __init__(
        self, launch: Launch, folder: Path, *, patience: float, progress: ProgressBar
    ) -> None:
        self.rank, self.size = launch.rank, launch.world_size
        self._launch, self._folder, self._patience = launch, folder / "ranks", patience
        self._progress = progress
        self._lock = (
            FolderLock(folder, f"--output {folder.parent}", _ADVICE, error=DataError)
            if self.rank == 0
            else None
        )
        self._nonce = secrets.token_hex(8)
        self._members: list[str] = []  # nonces by rank, once all have joined
        self._missing = ""  # which ranks have not joined yet
        self._barriers = 0  # reached by this rank
        self._open = 0  # barriers that all ranks have reached
        self._stage = 0  # number of the current stage: barriers before it
        self._done = [0]  # bytes done by this rank, per stage
        self._before = 0  # bytes of the current stage done by an earlier run
        self._beats = 0
        self._problem: DataError | None = None  # ends this rank
        self._failed: str | None = None  # this rank's error, for the other ranks
        self._left = False
        self._seen: dict[int, tuple[Any, float]] = {}  # by rank: its last count, and when it came
        self._unusable_since: float | None = None  # when the folder's errors began
        self._exchanging = threading.Lock()
        self._thread = PeriodicThread(self._beat, max(BEAT, self.size / 64), "rank group")

    # during the work

    @property
    def problem(self) -> DataError | None:
        """What ends this rank, where it is not an error of its own work."""
        return self._problem

    def barrier(self) -> None:
        """Wait for all ranks. Raises OtherRankFailed where one failed or stopped counting."""
        self._done.append(0)
        self._barriers += 1
        self._wait(lambda: self._open >= self._barriers)

    def start_stage(self, what: str, total: int, before: int) -> None:
        """Start counting bytes up to `total`; `before` of them were done by an earlier run."""
        self._stage, self._before = self._barriers, before
        if self.rank == 0:
            self._progress.begin(what, total, before)

    def advance(self, count: int) -> None:
        """Count bytes of the stage. Raises OtherRankFailed where another rank has failed."""
        self._done[self._stage] += count
        if self._problem:
            raise self._problem

    def claim_items(self, items: Sequence[_Item], name: Callable[[_Item], str]) -> Iterator[_Item]:
        """Yield the items for this rank: each item goes to one rank, the next that is free."""
        first = self.rank * len(items) // self.size
        for item in [*items[first:], *items[:first]]:
            if self.size == 1 or self._claim(name(item)):
                yield item

    # joining and leaving

    def __enter__(self) -> RankGroup:
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
        self._thread.stop()
        if error is None:
            self._left = True
        elif not isinstance(error, OtherRankFailed):
            interrupted = isinstance(error, KeyboardInterrupt)
            message = "interrupted" if interrupted else str(error) or type(error).__name__
            self._failed = f"{self._launch}: {message}"
        if self._thread.started:
            with suppress(OSError):
                self._exchange()
        if self._lock:
            if error is None:
                self._wait_for_exits()
            self._lock.release()

    def _clear(self) -> None:
        """Remove the files of an earlier run; a process of it that still runs ends itself."""
        with suppress(FileNotFoundError):
            self._folder.rename(self._folder.with_name(f"ranks-{self._nonce}"))
        for folder in self._folder.parent.glob("ranks-*"):
            shutil.rmtree(folder, ignore_errors=True)
        (self._folder / "claims").mkdir(parents=True, exist_ok=True)

    def _join(self) -> None:
        """Find the others: rank 0 lists the ranks that joined, which wait to be listed."""
        if self.rank == 0:
            self._missing = f"the other {self.size - 1} processes have not joined"
            self._wait(self._all_joined)
        else:
            self._missing = "rank 0 has not joined"
            self._wait(self._make_listed_check())

    def _all_joined(self) -> bool:
        records = {rank: self._read(rank) for rank in range(1, self.size)}
        for rank, record in records.items():
            if record and record["size"] != self.size:
                raise DataError(
                    f"rank {rank} counts {record['size']} processes, rank 0 {self.size}: start all "
                    "with one mpirun or srun"
                )
        missing = [str(rank) for rank, record in records.items() if not record]
        self._missing = f"rank {', '.join(missing[:8])} of {self.size} has not joined"
        if not missing:
            self._members = [self._nonce, *(r["nonce"] for r in records.values() if r)]
        return not missing

    def _make_listed_check(self) -> Callable[[], bool]:
        first: _Record = {}

        def is_listed() -> bool:
            record = self._read(0)
            if record is None:
                return False
            if self._nonce_in(record) == self._nonce:
                self._members = record["members"]
                return True
            first.update(first or record)
            if record["beat"] == first["beat"]:
                return False  # perhaps of an earlier run
            if record["failed"]:
                raise OtherRankFailed(record["failed"])
            if record["members"]:
                raise DataError(
                    f"another process is rank {self.rank} of {self.size} already; each needs a "
                    "rank of its own: start all with one mpirun or srun"
                )
            return False

        return is_listed

    def _wait_for_exits(self) -> None:
        """Wait, on rank 0 after all is done, until the other ranks no longer need the folder."""
        until = time.monotonic() + _EXIT_WAIT
        for rank in range(1, self.size):
            while time.monotonic() < until:
                record = self._read(rank)
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

    def _beat(self) -> None:
        """Exchange while the work goes on; called by the thread."""
        try:
            self._exchange()
            if self._lock:
                self._lock.require()
            self._unusable_since = None
        except DataError as error:
            self._problem = self._problem or error
        except OSError as error:  # short outages of a shared file system are tolerated
            self._unusable_since = self._unusable_since or time.monotonic()
            if time.monotonic() - self._unusable_since > self._patience:
                self._problem = DataError(f"{self._folder}: cannot be used ({error.strerror})")

    def _exchange(self) -> None:
        """Write this rank's progress and read that of the others."""
        with self._exchanging:
            self._beats += 1
            done = self._before + self._done[self._stage]
            if self.rank == 0:
                done += self._exchange_with_all()
                self._progress.update(done)
            else:
                self._write({
                    "nonce": self._nonce, "size": self.size, "beat": self._beats,
                    "done": self._done, "barriers": self._barriers, "failed": self._failed,
                    "left": self._left,
                })  # fmt: skip
                if self._members:
                    self._read_rank_0()

    def _exchange_with_all(self) -> int:
        """Read the other ranks' files and write rank 0's. Returns their bytes of the stage."""
        done, barriers = 0, [self._barriers]
        for rank in range(1, self.size if self._members else 0):
            record = self._read(rank)
            is_member = record is not None and record["nonce"] == self._members[rank]
            if not (record and record["left"]):
                self._check_alive(rank, record["beat"] if record and is_member else None)
            barriers.append(record["barriers"] if record and is_member else 0)
            if record and is_member:
                done += record["done"][self._stage] if self._stage < len(record["done"]) else 0
                if record["failed"]:
                    self._problem = self._problem or OtherRankFailed(record["failed"])
        if self._members or self.size == 1:
            # An open barrier stays open: a second process of a rank may overwrite its file.
            self._open = max(self._open, min(barriers))
        if self.size > 1:
            problem = str(self._problem) if self._problem else None
            self._write({
                "members": self._members, "beat": self._beats, "open": self._open,
                "failed": self._failed or problem,
            })  # fmt: skip
        return done

    def _read_rank_0(self) -> None:
        record = self._read(0)
        if record is None or self._nonce_in(record) != self._nonce:
            self._problem = OtherRankFailed("another preparation of the same folder has taken over")
            return
        self._check_alive(0, record["beat"])
        self._open = record["open"]
        if record["failed"]:
            self._problem = self._problem or OtherRankFailed(record["failed"])

    def _check_alive(self, rank: int, count: int | None) -> None:
        now = time.monotonic()
        last, since = self._seen.setdefault(rank, (count, now))
        if count != last:
            self._seen[rank] = (count, now)
        elif now - since > self._patience:
            self._problem = self._problem or OtherRankFailed(
                f"rank {rank} of {self.size} has shown no sign of life for {self._patience:g} s; "
                "it may have been killed: start again to resume"
            )

    def _nonce_in(self, record: _Record) -> str | None:
        members = record["members"]
        return members[self.rank] if self.rank < len(members) else None

    def _claim(self, name: str) -> bool:
        try:
            os.close(os.open(self._folder / "claims" / name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json"

    def _write(self, record: _Record) -> None:
        for _ in range(3):  # rank 0 may be moving an earlier run's folder away
            with suppress(FileNotFoundError, FileExistsError):
                self._folder.mkdir(parents=True, exist_ok=True)
                write_json(self._path(self.rank), record)
                return

    def _read(self, rank: int) -> _Record | None:
        with suppress(FileNotFoundError, ValueError):
            return json.loads(self._path(rank).read_text())
        return None
