"""Ends a run that hangs, so that it is started again: a thread beside the training of each rank.

A rank whose step, pause or start takes too long raises the alarm, a line in `RUN/ranks/alarm` that
the others read every second. Every rank then writes the stacks of all its threads, and what it is
doing; the lowest rank that still can says in one line who had not arrived; all end with `LOST`.
They end at once, from this thread: the main thread may be deep in a collective operation.
"""

from __future__ import annotations

import faulthandler
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hg_scale.config.training_sections import WatchdogConfig
from hg_scale.exit_codes import LOST
from hg_scale.training.monitoring.heartbeat import (
    PERIOD,
    Heartbeat,
    HeartbeatRecord,
    RankPosition,
    RunPhase,
    read_heartbeats,
)
from hg_scale.training.monitoring.stalled_ranks import describe_stalled

FIRST_STEPS = 3  # whose time says nothing of the others'
_GATHER = 5.0  # seconds to wait for the other ranks' words, and then for the line
_POLL = 0.1
_LONGEST = 1e8  # seconds that a timer in C may be set to; a user's "never" may be more
_MOST = 10.0  # seconds that count as passed between two looks: more means that all stood still


@dataclass(frozen=True)
class Limit:
    """How long something may take, in seconds, and what is usual, where that is known."""

    seconds: float
    key: str
    usual: float | None = None


def limit_of(config: WatchdogConfig, phase: RunPhase, durations: Sequence[float]) -> Limit:
    """For a phase, after steps of these `durations` in seconds."""
    if phase != "step":
        return Limit(config.pause, "pause")
    if len(durations) < FIRST_STEPS:
        return Limit(max(config.first, config.at_least), "first")
    usual = statistics.median(durations)
    return Limit(max(config.at_least, config.factor * usual), "factor", usual)


def period_of(config: WatchdogConfig) -> float:
    """Seconds between two heartbeats: less than usual only where limits are a few seconds."""
    return min(PERIOD, config.at_least / 4) if config.factor else PERIOD


class Watchdog:
    """Watches this rank; a context manager, inside the heartbeat's. `factor` 0: it does nothing.

    `per_stage`: ranks of a pipeline stage. `say` writes the line where a person sees it.
    """

    def __init__(
        self,
        heart: Heartbeat,
        config: WatchdogConfig,
        run: Path,
        per_stage: int,
        say: Callable[[str], None],
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self._heart, self._config, self._run, self._per_stage = heart, config, run, per_stage
        self._say, self._exit = say, leave
        self._alarm = heart.folder / "alarm"
        self._alarmed = threading.Event()
        self._ending, self._leave = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._waited = 0.0
        self._stacks = heart.folder / f"rank-{heart.rank:05}.stacks"
        self._file: BinaryIO | None = None
        self._arming = threading.Lock()  # held while the thread of C's is set, or called off

    def __enter__(self) -> Watchdog:
        if self._config.factor:
            with suppress(OSError):
                self._file = self._stacks.open("wb", buffering=0)
            self._heart.each_tick = self._look_around
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._config.factor:
            return
        if self._ending.is_set():  # the error of another rank's end must not come before ours
            self._thread.join()
        self._leave.set()
        self._thread.join()
        self._heart.each_tick = lambda: None
        with self._arming:
            faulthandler.cancel_dump_traceback_later()
            file, self._file = self._file, None
        if file:
            file.close()
            with suppress(OSError):
                self._stacks.unlink(missing_ok=True)

    def _look_around(self) -> None:
        """On the heartbeat's thread, every second: has another rank raised the alarm?

        And a thread of C's is set to write the stacks where Python's threads get no turn any more:
        shortly after the limit, if this is not called again before.
        """
        with self._arming:
            if self._file and not self._ending.is_set():
                left = self._limit(self._heart.place).seconds - self._waited
                left = min(max(left, 0), _LONGEST)
                faulthandler.dump_traceback_later(left + 2, file=self._file.fileno())
        if self._alarm.read_bytes():
            self._alarmed.set()

    def _limit(self, place: RankPosition) -> Limit:
        return limit_of(self._config, place.phase, list(self._heart.durations))

    def _watch(self) -> None:
        """On a thread that never touches the disk, which may be what hangs."""
        tick = min(1.0, self._config.at_least / 10)
        seen, last = self._heart.place, time.monotonic()
        while not self._leave.wait(tick):
            place, now = self._heart.place, time.monotonic()
            passed, last = min(now - last, _MOST), now
            same = (place.step, place.phase) == (seen.step, seen.phase)
            self._waited = self._waited + passed if same else min(passed, now - place.since)
            seen = place
            limit = self._limit(place)
            if self._waited > limit.seconds or self._alarmed.is_set():
                self._end(place, limit)
                return

    def _end(self, place: RankPosition, limit: Limit) -> None:
        self._ending.set()
        words = threading.Thread(target=self._testify, args=(place, limit), daemon=True)
        words.start()
        words.join(4 * _GATHER)  # a disk that hangs must not keep us
        self._exit(LOST)

    def _testify(self, place: RankPosition, limit: Limit) -> None:
        heart = self._heart
        _append(self._alarm, {"rank": heart.rank, "step": place.step})
        folder = self._stacks_folder(place.step)
        self._write_stacks(folder)
        heart.hung = True
        heart.beat()
        if heart.rank and self._has_been_said():
            return
        # Not all ranks read all files: rank 0 does, the others where it does not speak.
        beats = read_heartbeats(self._run) if heart.rank else self._hear_all()
        first = min((rank for rank, beat in beats.items() if beat.hung), default=heart.rank)
        if first < heart.rank and self._has_been_said():
            return
        silent = 3 * period_of(self._config)
        line = describe_hang(place, self._waited, limit, beats, self._per_stage, silent, folder)
        self._say(line)
        record = {"time": time.time(), "step": place.step, "line": line}
        _append(self._run / "watchdog.jsonl", record)
        # Of ranks that cannot do so themselves; what C still writes there arrives, too.
        for rank in range(heart.world_size):
            if rank not in beats or not beats[rank].hung:
                with suppress(OSError):
                    left = heart.folder / f"rank-{rank:05}.stacks"
                    left.replace(folder / f"rank-{rank:05}.txt")
        _append(self._alarm, {"said_by": heart.rank})

    def _stacks_folder(self, step: int) -> Path:
        """That of the rank that raised the alarm first."""
        for line in _lines_of(self._alarm):
            step = line.get("step", step)
            break
        return self._run / "stacks" / f"step-{step}"

    def _write_stacks(self, folder: Path) -> None:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback(self._file.fileno() if self._file else 2, all_threads=True)
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            self._stacks.replace(folder / f"rank-{self._heart.rank:05}.txt")

    def _hear_all(self) -> dict[int, HeartbeatRecord]:
        """What all ranks say, once each has said that it hangs, or after some seconds."""
        end = time.monotonic() + _GATHER
        while True:
            beats = read_heartbeats(self._run)
            heard = sum(beat.hung for beat in beats.values())
            readable = self._heart.rank in beats
            if heard == self._heart.world_size or not readable or time.monotonic() > end:
                return beats
            time.sleep(_POLL)

    def _has_been_said(self) -> bool:
        """Whether another rank gives the line, after some seconds at most."""
        end = time.monotonic() + _GATHER + 1
        while time.monotonic() < end:
            if any("said_by" in line for line in _lines_of(self._alarm)):
                return True
            time.sleep(_POLL)
        return False


def describe_hang(
    place: RankPosition,
    waited: float,
    limit: Limit,
    beats: dict[int, HeartbeatRecord],
    per_stage: int,
    silent: float,
    folder: Path,
) -> str:
    """The one line: what takes how long, who had not arrived, where to look, what comes."""
    where = {"start": "the start", "end": f"the end after step {place.step}"}
    what = where.get(place.phase, f"the {place.phase} after step {place.step}")
    if place.phase == "step":
        what = f"step {place.step}"
    if limit.usual is not None:
        how = f"{waited / limit.usual:.3g} x the usual {limit.usual:.3g} s"
    else:
        how = f"the limit is watchdog.{limit.key} {limit.seconds:g}"
    who = describe_stalled(beats, per_stage, time.time(), silent) or "no rank is behind the others"
    return (
        f"{what} takes {waited:.3g} s, {how}: {who}; stacks in {folder}; the job is to be started "
        "again"
    )


def clear_alarm(run: Path) -> None:
    """For rank 0, before any rank watches: an empty file, for NFS remembers a missing one."""
    with suppress(OSError):
        (run / "ranks" / "alarm").write_bytes(b"")


def _append(path: Path, record: dict[str, Any]) -> None:
    with suppress(OSError), path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _lines_of(path: Path) -> list[dict[str, Any]]:
    with suppress(OSError, ValueError):
        return [json.loads(line) for line in path.read_text().splitlines()]
    return []
