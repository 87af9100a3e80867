"""A rank's sign of life: `RUN/ranks/rank-00003.json`, written every few seconds by a thread.

The loop only says where it stands, which costs microseconds. Others read the files: the watchdog
when a step hangs, `hg-scale status` on any machine. A disk that cannot be written costs the
files, never the run. Imports no torch.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hg_scale.atomic_write import write_json

RunPhase = Literal["start", "step", "save", "validation", "end"]
Work = Literal["", "data", "forward"]

PERIOD = 5.0  # seconds between two beats
STALE = 60.0  # seconds without one after which a rank is taken for gone
_TICK = 1.0
_RECENT = 50  # steps whose duration is known


class RankPosition(NamedTuple):
    """Where a rank stands, since when (`time.monotonic`).

    `work`: what it does by itself just now; "" where other ranks take part. `turns`: how often it
    began or ended such work since then.
    """

    step: int
    phase: RunPhase
    since: float
    work: Work = ""
    turns: int = 0


@dataclass(frozen=True)
class HeartbeatRecord:
    """What a rank's file says; times in seconds since 1970, durations in seconds.

    `hung`: its watchdog is ending it. `ended`: it left by itself. `pid_space`: where `pid` counts.
    """

    rank: int
    world_size: int
    host: str
    pid: int
    time: float
    step: int
    phase: RunPhase
    work: Work
    turns: int
    since: float
    step_seconds: float | None = None
    data_seconds: float | None = None
    forward_seconds: float | None = None
    hung: bool = False
    ended: bool = False
    pid_space: str = ""

    @property
    def killed(self) -> bool:
        """Whether its process is no more and did not say so, as far as one can see from here."""
        seen = not self.ended and self.pid_space and self.pid_space == pid_space()
        return bool(seen) and not Path(f"/proc/{self.pid}").exists()

    @property
    def doing(self) -> str:
        """In words."""
        if self.phase == "step":
            work = {"data": "reading data for", "forward": "in the forward pass of"}
            return f"{work.get(self.work, 'in')} step {self.step}"
        if self.phase == "start":
            return "starting"
        if self.phase == "end":
            return f"ending after step {self.step}"
        return f"{'saving' if self.phase == 'save' else 'validating'} after step {self.step}"


class Heartbeat:
    """Where this rank stands, and the thread that writes it down. A context manager."""

    def __init__(
        self,
        run: Path,
        rank: int,
        world_size: int,
        warn: Callable[[str], None],
        period: float = PERIOD,
    ) -> None:
        self.folder, self.rank, self.world_size = run / "ranks", rank, world_size
        self.host = socket.gethostname()
        self.place = RankPosition(0, "start", time.monotonic())
        self.durations: deque[float] = deque(maxlen=_RECENT)  # of the last steps
        self.own: dict[str, float] = {}  # data_seconds, forward_seconds: averages a step
        self.table: dict[str, Any] | None = None  # to be written as `stragglers.json`
        self.hung = self.ended = False
        self.each_tick: Callable[[], None] = lambda: None
        self._warn, self._period, self._warned = warn, period, False
        self._writing = threading.Lock()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)

    def enter(self, phase: RunPhase, step: int) -> None:
        """The next step begins, or a pause after one."""
        now, before = time.monotonic(), self.place
        if before.phase == "step":
            self.durations.append(now - before.since)
        self.place = RankPosition(step, phase, now)

    def begin(self, work: Work) -> None:
        """From here on this rank works by itself."""
        step, phase, since, _, turns = self.place
        self.place = RankPosition(step, phase, since, work, turns + 1)

    def end(self) -> None:
        """From here on it may wait for others."""
        self.begin("")

    def beat(self) -> None:
        """Write the files now."""
        place = self.place
        beat = HeartbeatRecord(
            rank=self.rank,
            world_size=self.world_size,
            host=self.host,
            pid=os.getpid(),
            time=time.time(),
            step=place.step,
            phase=place.phase,
            work=place.work,
            turns=place.turns,
            since=time.time() - (time.monotonic() - place.since),
            step_seconds=self.durations[-1] if self.durations else None,
            hung=self.hung,
            ended=self.ended,
            pid_space=pid_space(),
            **self.own,
        )
        with self._writing:
            try:
                write_json(self.folder / f"rank-{self.rank:05}.json", asdict(beat))
                if self.table is not None:
                    table, self.table = self.table, None
                    write_json(self.folder / "stragglers.json", table)
            except OSError as error:
                if not self._warned:
                    self._warned = True
                    self._warn(f"{self.folder}: no heartbeat can be written: {error.strerror}")

    def _keep_beating(self) -> None:
        tick, next_beat = min(_TICK, self._period), 0.0
        while True:
            if time.monotonic() >= next_beat:
                self.beat()
                next_beat = time.monotonic() + self._period
            with suppress(OSError, RuntimeError):
                self.each_tick()
            if self._leave.wait(tick):
                return

    def __enter__(self) -> Heartbeat:
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        self._thread.join(self._period)  # a disk that hangs must not hold up the end
        self.ended = True
        if not self._thread.is_alive():
            self.beat()


def pid_space() -> str:
    """What differs between two places where one number means two processes: hosts, containers."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def clear_ranks(run: Path) -> None:
    """Remove what the ranks of an earlier start left; for rank 0, before any begins to beat."""
    folder = run / "ranks"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        for path in [*folder.glob("rank-*.json*"), *folder.glob("stragglers.json*")]:
            path.unlink(missing_ok=True)


def read_heartbeats(run: Path) -> dict[int, HeartbeatRecord]:
    """The last word of each rank; a file that cannot be understood is passed over."""
    beats = {}
    known = {field.name for field in fields(HeartbeatRecord)}
    for path in sorted((run / "ranks").glob("rank-*.json")):
        with suppress(OSError, ValueError, TypeError, AttributeError):
            values = json.loads(path.read_text())
            beat = HeartbeatRecord(**{key: value for key, value in values.items() if key in known})
            beats[beat.rank] = beat
    return beats
