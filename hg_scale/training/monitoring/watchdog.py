"""Ends a run that hangs, so that it can be restarted: a thread of every rank.

A rank whose step, pause or start exceeds its limit raises the alarm, a line in `RUN/ranks/alarm`
that the others check every second. Every rank then writes the stacks of all its threads and its
heartbeat; the lowest rank that still can reports in one line which ranks are stalled; all exit with
`LOST`. They exit from this thread, since the main thread may be blocked in a collective.
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

from hg_scale.bounded_read import TEXT_BYTES, FormatError, parse_record, read_bounded
from hg_scale.config.training_sections import WatchdogConfig
from hg_scale.exit_codes import LOST
from hg_scale.training.monitoring.heartbeat import (
    PERIOD,
    Heartbeat,
    HeartbeatRecord,
    RankPosition,
    RunPhase,
    file_system_time,
    read_heartbeats,
    read_heartbeats_by_file_time,
)
from hg_scale.training.monitoring.stalled_ranks import describe_stalled

FIRST_STEPS = 3  # slower than later ones: kernels are compiled
_GATHER = 5.0  # seconds to wait for the other ranks' heartbeats, and then for the report
_POLL = 0.1
_MAX_TIMER = 1e8  # seconds; faulthandler's timer takes no more, but a user's limit may be longer
_MAX_ELAPSED = 10.0  # seconds that count between two checks: more means a suspended process


@dataclass(frozen=True)
class HangLimit:
    """Seconds that a phase may take, the key of `watchdog` that sets them, and the usual time."""

    seconds: float
    key: str
    usual: float | None = None


def hang_limit(config: WatchdogConfig, phase: RunPhase, durations: Sequence[float]) -> HangLimit:
    """Return the limit of a phase, given the `durations` of recent steps in seconds."""
    if phase != "step":
        return HangLimit(config.pause, "pause")
    if len(durations) < FIRST_STEPS:
        return HangLimit(max(config.first, config.at_least), "first")
    usual = statistics.median(durations)
    return HangLimit(max(config.at_least, config.factor * usual), "factor", usual)


def heartbeat_period(config: WatchdogConfig) -> float:
    """Return the seconds between heartbeats: fewer than PERIOD if limits are a few seconds."""
    return min(PERIOD, config.at_least / 4) if config.factor else PERIOD


class Watchdog:
    """Watchdog of this rank: a context manager within the heartbeat's; with `factor` 0 it is off.

    `per_stage`: ranks of a pipeline stage. `report` prints the line on the terminal. `terminate`
    ends the process with an exit code.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        config: WatchdogConfig,
        run: Path,
        per_stage: int,
        report: Callable[[str], None],
        terminate: Callable[[int], Any] = os._exit,
    ) -> None:
        self._heartbeat, self._config, self._run = heartbeat, config, run
        self._per_stage, self._report, self._terminate = per_stage, report, terminate
        self._alarm = heartbeat.folder / "alarm"
        self._alarmed = threading.Event()
        self._ending, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._elapsed = 0.0  # seconds in the current phase
        self._stacks = heartbeat.folder / f"rank-{heartbeat.rank:05}.stacks"
        self._file: BinaryIO | None = None
        self._arming = threading.Lock()  # held while faulthandler's timer is set or cancelled

    def __enter__(self) -> Watchdog:
        if self._config.factor:
            with suppress(OSError):
                self._file = self._stacks.open("wb", buffering=0)
            self._heartbeat.on_tick = self._on_tick
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._config.factor:
            return
        if self._ending.is_set():  # report the hang before the error that other ranks' exits cause
            self._thread.join()
        self._stop.set()
        self._thread.join()
        self._heartbeat.on_tick = lambda: None
        with self._arming:
            faulthandler.cancel_dump_traceback_later()
            file, self._file = self._file, None
        if file:
            file.close()
            with suppress(OSError):
                self._stacks.unlink(missing_ok=True)

    def _on_tick(self) -> None:
        """Check every second, on the heartbeat's thread, whether another rank raised the alarm.

        Also restart faulthandler's timer, a thread in C. It writes the stacks shortly after the
        limit if no Python thread gets the interpreter lock to restart it.
        """
        with self._arming:
            if self._file and not self._ending.is_set():
                left = self._limit(self._heartbeat.position).seconds - self._elapsed
                left = min(max(left, 0), _MAX_TIMER)
                faulthandler.dump_traceback_later(left + 2, file=self._file.fileno())
        if self._alarm.read_bytes():
            self._alarmed.set()

    def _limit(self, position: RankPosition) -> HangLimit:
        return hang_limit(self._config, position.phase, list(self._heartbeat.durations))

    def _watch(self) -> None:
        """Check the time of the current phase; never touches the disk, which may hang itself."""
        tick = min(1.0, self._config.at_least / 10)
        previous, last = self._heartbeat.position, time.monotonic()
        while not self._stop.wait(tick):
            position, now = self._heartbeat.position, time.monotonic()
            passed, last = min(now - last, _MAX_ELAPSED), now
            same = (position.step, position.phase) == (previous.step, previous.phase)
            self._elapsed = self._elapsed + passed if same else min(passed, now - position.since)
            previous = position
            limit = self._limit(position)
            if self._elapsed > limit.seconds or self._alarmed.is_set():
                self._end(position, limit)
                return

    def _end(self, position: RankPosition, limit: HangLimit) -> None:
        """Report the hang and terminate, after a bounded time even if the disk hangs."""
        self._ending.set()
        report = threading.Thread(target=self._report_hang, args=(position, limit), daemon=True)
        report.start()
        report.join(4 * _GATHER)
        self._terminate(LOST)

    def _report_hang(self, position: RankPosition, limit: HangLimit) -> None:
        """Raise the alarm and write the stacks; the lowest rank that can also reports the hang."""
        heartbeat = self._heartbeat
        _append(self._alarm, {"rank": heartbeat.rank, "step": position.step})
        folder = self._stacks_folder(position.step)
        self._write_stacks(folder)
        heartbeat.hung = True
        heartbeat.beat()
        if heartbeat.rank and self._is_reported():
            return
        # Only rank 0 waits for all heartbeats; another rank reads them if rank 0 does not report.
        beats = read_heartbeats(self._run) if heartbeat.rank else self._gather_heartbeats()
        lowest = min((rank for rank, beat in beats.items() if beat.hung), default=heartbeat.rank)
        if lowest < heartbeat.rank and self._is_reported():
            return
        silent = 3 * heartbeat_period(self._config)
        by_file, _ = read_heartbeats_by_file_time(self._run)  # since the clocks of hosts differ
        line = describe_hang(
            position, self._elapsed, limit, by_file or beats, self._per_stage, silent, folder,
            file_system_time(self._run),
        )  # fmt: skip
        self._report(line)
        record = {"time": time.time(), "step": position.step, "line": line}
        _append(self._run / "watchdog.jsonl", record)
        # Move the files of ranks that cannot; faulthandler's timer still writes to the open file.
        for rank in range(heartbeat.world_size):
            if rank not in beats or not beats[rank].hung:
                with suppress(OSError):
                    stacks = heartbeat.folder / f"rank-{rank:05}.stacks"
                    stacks.replace(folder / f"rank-{rank:05}.txt")
        _append(self._alarm, {"said_by": heartbeat.rank})

    def _stacks_folder(self, step: int) -> Path:
        """Return the folder of the step at which the first rank raised the alarm."""
        for line in _lines_of(self._alarm):
            step = line.get("step", step)
            break
        return self._run / "stacks" / f"step-{step}"

    def _write_stacks(self, folder: Path) -> None:
        faulthandler.cancel_dump_traceback_later()
        faulthandler.dump_traceback(self._file.fileno() if self._file else 2, all_threads=True)
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            self._stacks.replace(folder / f"rank-{self._heartbeat.rank:05}.txt")

    def _gather_heartbeats(self) -> dict[int, HeartbeatRecord]:
        """Read all heartbeats once every rank has set `hung`, or after _GATHER seconds."""
        end = time.monotonic() + _GATHER
        while True:
            beats = read_heartbeats(self._run)
            hung = sum(beat.hung for beat in beats.values())
            readable = self._heartbeat.rank in beats
            if hung == self._heartbeat.world_size or not readable or time.monotonic() > end:
                return beats
            time.sleep(_POLL)

    def _is_reported(self) -> bool:
        """Wait some seconds at most for another rank's report; whether there was one."""
        end = time.monotonic() + _GATHER + 1
        while time.monotonic() < end:
            if any("said_by" in line for line in _lines_of(self._alarm)):
                return True
            time.sleep(_POLL)
        return False


def describe_hang(
    position: RankPosition,
    elapsed: float,
    limit: HangLimit,
    beats: dict[int, HeartbeatRecord],
    per_stage: int,
    silent: float,
    folder: Path,
    now: float | None = None,
) -> str:
    """Return one line: the phase and its time, the stalled ranks, the stacks, what happens next."""
    step = position.step
    phases = {"start": "the start", "step": f"step {step}"}
    phase = phases.get(position.phase, f"the {position.phase} after step {step}")
    if limit.usual is not None:
        excess = f"{elapsed / limit.usual:.3g} x the usual {limit.usual:.3g} s"
    else:
        excess = f"the limit is watchdog.{limit.key} {limit.seconds:g}"
    now = time.time() if now is None else now
    stalled = describe_stalled(beats, per_stage, now, silent) or "no rank is behind the others"
    return (
        f"{phase} takes {elapsed:.3g} s, {excess}: {stalled}; stacks in {folder}; the job is to be "
        "started again"
    )


def clear_alarm(run: Path) -> None:
    """Empty the alarm; rank 0 calls it before any watchdog starts.

    The file must exist: an NFS client caches that a file is missing.
    """
    with suppress(OSError):
        (run / "ranks" / "alarm").write_bytes(b"")


def _append(path: Path, record: dict[str, Any]) -> None:
    with suppress(OSError), path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _lines_of(path: Path) -> list[dict[str, Any]]:
    with suppress(OSError, FormatError):
        lines = read_bounded(path, TEXT_BYTES).splitlines()
        return [record for line in lines if (record := parse_record(line)) is not None]
    return []
