"""Heartbeat of a rank: a thread rewrites `RUN/ranks/rank-00003.json` every few seconds.

The training loop only sets its current position, which costs microseconds. The files are read by
the watchdog when a step hangs, and by `hg-scale status` on any machine. If they cannot be written,
the run continues without them. Imports no torch.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hg_scale.atomic_write import write_json

RunPhase = Literal["start", "step", "save", "validation", "end"]
Work = Literal["", "data", "forward"]

PERIOD = 5.0  # seconds between two heartbeats
STALE = 60.0  # seconds without a heartbeat after which a rank counts as gone
_TICK = 1.0
_RECENT = 50  # number of steps whose durations are kept


class RankPosition(NamedTuple):
    """Step and phase of a rank, and when the phase began (`since`, of `time.monotonic`).

    `work`: local work in progress, "" while the rank may wait for others. `turns`: how often such
    work has begun or ended since then.
    """

    step: int
    phase: RunPhase
    since: float
    work: Work = ""
    turns: int = 0


@dataclass(frozen=True)
class HeartbeatRecord:
    """Contents of a rank's heartbeat file; times in seconds since 1970, durations in seconds.

    `hung`: the rank's watchdog is ending it. `ended`: it exited by itself. `pid_space`: the PID
    namespace of `pid`.
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
        """Whether the process is gone without `ended`; False in another PID namespace."""
        same_namespace = self.pid_space and self.pid_space == pid_namespace()
        return bool(same_namespace) and not self.ended and not Path(f"/proc/{self.pid}").exists()

    @property
    def activity(self) -> str:
        """What the rank is doing, as `reading data for step 7`."""
        if self.phase == "step":
            work = {"data": "reading data for", "forward": "in the forward pass of"}
            return f"{work.get(self.work, 'in')} step {self.step}"
        if self.phase == "start":
            return "starting"
        if self.phase == "end":
            return f"ending after step {self.step}"
        return f"{'saving' if self.phase == 'save' else 'validating'} after step {self.step}"


class Heartbeat:
    """Position of this rank, and the thread that writes it; a context manager."""

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
        self.position = RankPosition(0, "start", time.monotonic())
        self.durations: deque[float] = deque(maxlen=_RECENT)  # seconds of the last steps
        self.own_seconds: dict[str, float] = {}  # data_seconds, forward_seconds: means per step
        self.table: dict[str, Any] | None = None  # next contents of `stragglers.json`
        self.hung = self.ended = False
        self.on_tick: Callable[[], None] = lambda: None
        self._warn, self._period, self._warned = warn, period, False
        self._writing = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)

    def enter(self, phase: RunPhase, step: int) -> None:
        """Begin a step, or a phase after step `step`."""
        now, previous = time.monotonic(), self.position
        if previous.phase == "step":
            self.durations.append(now - previous.since)
        self.position = RankPosition(step, phase, now)

    def begin(self, work: Work) -> None:
        """Begin local work, in which this rank waits for no other."""
        step, phase, since, _, turns = self.position
        self.position = RankPosition(step, phase, since, work, turns + 1)

    def end(self) -> None:
        """End local work; from now on this rank may wait for others."""
        self.begin("")

    def beat(self) -> None:
        """Write the heartbeat file, and `stragglers.json` if it has a new table."""
        position = self.position
        beat = HeartbeatRecord(
            rank=self.rank,
            world_size=self.world_size,
            host=self.host,
            pid=os.getpid(),
            time=time.time(),
            step=position.step,
            phase=position.phase,
            work=position.work,
            turns=position.turns,
            since=time.time() - (time.monotonic() - position.since),
            step_seconds=self.durations[-1] if self.durations else None,
            hung=self.hung,
            ended=self.ended,
            pid_space=pid_namespace(),
            **self.own_seconds,
        )
        with self._writing:
            try:
                write_json(_heartbeat_path(self.folder, self.rank), asdict(beat))
                if self.table is not None:
                    table, self.table = self.table, None
                    write_json(self.folder / "stragglers.json", table)
            except OSError as error:
                if not self._warned:
                    self._warned = True
                    self._warn(f"{self.folder}: cannot write the heartbeat: {error.strerror}")

    def _keep_beating(self) -> None:
        tick, next_beat = min(_TICK, self._period), 0.0
        while True:
            if time.monotonic() >= next_beat:
                self.beat()
                next_beat = time.monotonic() + self._period
            with suppress(OSError, RuntimeError):
                self.on_tick()
            if self._stop.wait(tick):
                return

    def __enter__(self) -> Heartbeat:
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(self._period)  # a disk that hangs must not delay the end
        self.ended = True
        if not self._thread.is_alive():
            self.beat()


def pid_namespace() -> str:
    """Identify the host's boot and the PID namespace, within which PIDs are unique."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def clear_ranks(run: Path) -> None:
    """Remove the files of an earlier start: heartbeats, end files, the slow ranks.

    Rank 0 calls it once it has locked the folder, before any rank's first heartbeat.
    """
    folder = run / "ranks"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in ("rank-*.json*", "rank-*.end*", "stragglers.json*"):
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)


def file_system_time(folder: Path) -> float:
    """Return the time that the file system of `folder` gives a file now, in seconds since 1970.

    Of a shared one this is one clock for all hosts. The local clock if nothing can be written.
    """
    probe = folder / f".clock-{secrets.token_hex(4)}"
    try:
        probe.touch(exist_ok=False)
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)
    except OSError:
        return time.time()


def read_heartbeats_by_file_time(
    run: Path,
) -> tuple[dict[int, HeartbeatRecord], dict[int, float]]:
    """Read the heartbeats with the times of their files, to compare with `file_system_time`.

    Also returns by how many seconds the clock of each rank's host is ahead of those times.
    """
    beats, ahead = {}, {}
    for rank, beat in read_heartbeats(run).items():
        with suppress(OSError):
            written = _heartbeat_path(run / "ranks", rank).stat().st_mtime
            ahead[rank] = beat.time - written
            beats[rank] = replace(beat, time=written, since=beat.since - ahead[rank])
    return beats, ahead


def _heartbeat_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05}.json"


def read_heartbeats(run: Path) -> dict[int, HeartbeatRecord]:
    """Read the heartbeat of each rank; unreadable files are skipped."""
    beats = {}
    names = {field.name for field in fields(HeartbeatRecord)}
    for path in sorted((run / "ranks").glob("rank-*.json")):
        with suppress(OSError, ValueError, TypeError, AttributeError):
            values = json.loads(path.read_text())
            beat = HeartbeatRecord(**{key: value for key, value in values.items() if key in names})
            beats[beat.rank] = beat
    return beats
