"""The records in a run folder, each read once, for the status of the run; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Required

from pydantic import ConfigDict, Field, FiniteFloat
from typing_extensions import TypedDict  # that of typing lacks what pydantic needs before 3.12

from hg_scale.bounded_read import (
    RECORD_BYTES,
    TABLE_BYTES,
    TEXT_BYTES,
    Count,
    FormatError,
    parse_record,
    read_json,
    read_object,
    validated,
)
from hg_scale.errors import UserError
from hg_scale.metrics_file import read_recent
from hg_scale.run_starts import RunStart, read_starts
from hg_scale.training.metrics import RECENT_LINES
from hg_scale.training.monitoring.heartbeat import (
    PERIOD,
    HeartbeatRecord,
    file_system_time,
    read_heartbeats,
    read_heartbeats_by_file_time,
)
from hg_scale.training.monitoring.run_end import EndEntry

_FILES = ("config.json", "metrics.jsonl", "jobs.jsonl", "ranks")  # a run folder has one of them


@dataclass(frozen=True)
class RunRecords:
    """Records of a run. All times are by one clock, `now` included.

    steps, validation: the last lines of `metrics.jsonl`. jobs: of `jobs.jsonl`, without refused
    ones. ahead: by how many seconds the clock of each rank's host is ahead of the file system's.
    """

    run: Path
    now: float
    steps: list[dict[str, Any]]
    validation: dict[str, Any] | None
    jobs: list[dict[str, Any]]
    beats: Mapping[int, HeartbeatRecord]
    ahead: Mapping[int, float]
    starts: list[RunStart]
    config: dict[str, Any]

    @classmethod
    def read(cls, run: Path, now: float | None) -> RunRecords:
        """Read the files of a run folder; `now` as in `read_status`. Raises UserError."""
        if not any((run / name).exists() for name in _FILES):
            names = f"{', '.join(_FILES[:-1])} or {_FILES[-1]}"
            raise UserError(f"{run} is not a run folder: no {names}")
        steps, validation = read_recent(run / "metrics.jsonl", RECENT_LINES)
        jobs = list(_read_records(run / "jobs.jsonl", _JobEntry))
        jobs = [job for job in jobs if job["event"] != "end" or "code" in job]
        ahead: Mapping[int, float] = {}
        if now is None:
            now = file_system_time(run)
            beats, ahead = read_heartbeats_by_file_time(run)
        else:
            beats = read_heartbeats(run)
        jobs = without_refused(jobs, last_pulse(beats))
        starts, config = read_starts(run), _read_config(run)
        return cls(run, now, steps, validation, jobs, beats, ahead, starts, config)

    @property
    def total_steps(self) -> int | None:
        """`training.steps`, if it can be read."""
        return self._count("training", "steps")

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return self._count("parallel", "pipeline") or 1

    def section(self, name: str) -> dict[str, Any]:
        """Return a section of the configuration; empty where it has none."""
        section = self.config.get(name)
        return section if isinstance(section, dict) else {}

    def _count(self, section: str, key: str) -> int | None:
        with suppress(FormatError, KeyError):
            return validated(Count, self.section(section)[key])
        return None

    def rank_ends(self) -> dict[int, tuple[int, str]]:
        """Return exit code and error of the ranks of the last start that ended by their own error.

        Without a heartbeat the start failed before its first one, and all files are of that start.
        """
        ends = {}
        for path in sorted((self.run / "ranks").glob("rank-*.end")):
            with suppress(OSError, ValueError, FormatError):
                rank = int(path.stem.removeprefix("rank-"))
                end: EndEntry = validated(EndEntry, read_json(path, RECORD_BYTES))
                if rank in self.beats or not self.beats:
                    ends[rank] = end["code"], end["line"]
        return ends

    def stragglers(self) -> StragglerTable | None:
        """Return the last straggler table, if there is one."""
        with suppress(OSError, FormatError):
            path = self.run / "ranks" / "stragglers.json"
            return validated(StragglerTable, read_json(path, TABLE_BYTES))
        return None

    def last_hang(self) -> dict[str, Any] | None:
        """Return the last report of the watchdog, if there is one."""
        reports = list(_read_records(self.run / "watchdog.jsonl", _WatchdogEntry))
        return reports[-1] if reports else None


def without_refused(jobs: list[dict[str, Any]], pulse: float | None) -> list[dict[str, Any]]:
    """Leave out jobs that ended while another one kept the run folder: they changed nothing.

    jobs: the records of `jobs.jsonl`. pulse: the time of the last heartbeat of a living rank.
    """

    def start_of(record: dict[str, Any]) -> tuple[Any, Any]:
        return record.get("job"), record.get("start")

    refused, running = set(), None
    for number, record in enumerate(jobs):
        own, later = start_of(record), jobs[number + 1 :]
        if record["event"] == "end":
            running = None if own == running else running
            continue
        ended = [r["time"] for r in later if start_of(r) == own and r["event"] == "end"]
        outlived = ended and pulse is not None and pulse > ended[0] + PERIOD
        if running and ended and (outlived or running in map(start_of, later)):
            refused.add(own)
        else:
            running = own
    return [record for record in jobs if start_of(record) not in refused]


def last_pulse(beats: Mapping[int, HeartbeatRecord]) -> float | None:
    """Return the time of the last heartbeat of a rank that may be alive."""
    running = [beat.time for beat in beats.values() if not beat.ended and not beat.killed]
    return max(running, default=None)


class _JobEntry(TypedDict, total=False):
    """A line of jobs.jsonl, which slurm/common.sh writes."""

    __pydantic_config__ = ConfigDict(extra="allow", strict=True)  # type: ignore[misc]

    time: Required[float]
    job: Required[str | int]
    event: Required[str]
    start: Count
    code: Count
    requeued: bool
    state: str
    ends: float
    log: str


class _StragglerRow(TypedDict):
    rank: Count
    ratio: FiniteFloat
    data_seconds: FiniteFloat
    forward_seconds: FiniteFloat


class StragglerTable(TypedDict):
    """The content of stragglers.json."""

    ranks: Annotated[list[_StragglerRow], Field(min_length=1)]
    threshold: FiniteFloat
    step: Count


class _WatchdogEntry(TypedDict):
    """A line of watchdog.jsonl."""

    time: float
    line: str


def _read_config(run: Path) -> dict[str, Any]:
    """Return the run's configuration; empty where it cannot be read."""
    with suppress(OSError, FormatError):
        return read_object(run / "config.json", TEXT_BYTES)
    return {}


def _read_records(path: Path, kind: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file; incomplete lines are skipped."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(RECORD_BYTES):
            record = parse_record(line, kind)
            if record is not None:
                yield record
