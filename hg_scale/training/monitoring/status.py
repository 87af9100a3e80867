"""State of a run, read from the files of its folder on any machine that sees them; no torch."""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
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
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.find import find_latest
from hg_scale.errors import UserError
from hg_scale.exit_codes import REQUEUE, meaning
from hg_scale.formats import format_duration, format_number
from hg_scale.metrics_file import read_recent
from hg_scale.run_starts import read_starts
from hg_scale.training.metrics import RECENT_LINES, seconds_left
from hg_scale.training.monitoring.heartbeat import (
    PERIOD,
    STALE,
    HeartbeatRecord,
    file_system_time,
    read_heartbeats,
    read_heartbeats_by_file_time,
)
from hg_scale.training.monitoring.run_end import EndEntry, read_run_end
from hg_scale.training.monitoring.run_state import STATUS_CODES, RunState, classify, is_stalled
from hg_scale.training.monitoring.stalled_ranks import describe_stalled

QUIET_LINES, QUIET_SECONDS = 10, 600  # a run that logs nothing for both counts as dead
CLOCK_LIMIT = 30  # seconds by which a clock may differ before it is mentioned
_MAX_NAMED = 4  # ranks named in a line
_ENDINGS = {"CANCELLED": "was cancelled", "TIMEOUT": "reached its time limit"}
_TAIL_BYTES = 64 * 1024
_JSON_STEP_KEYS = ("step", "loss", "bits_per_byte", "tokens_per_second", "mfu", "skipped_steps")
_ERROR_WORDS = ("error", "Traceback", "warning", "exit code", "Killed", "CANCELLED", "not saved")


@dataclass(frozen=True)
class RunStatus:
    """Output of `hg-scale status`: `lines` by label. `alive` is None if the files do not tell.

    `values`: the keys of `--json`.
    """

    alive: bool | None
    lines: dict[str, str]
    errors: list[str]
    state: RunState
    values: dict[str, Any]


def read_status(run: Path, now: float | None = None, last_errors: int = 5) -> RunStatus:
    """Read the status of a run folder. Raises UserError.

    `now`: seconds since 1970, by the clock of the ranks' records. None: the present, by the times
    that the file system of `run` gives, since the clocks of hosts differ.
    """
    names = ("config.json", "metrics.jsonl", "jobs.jsonl", "ranks")
    if not any((run / name).exists() for name in names):
        raise UserError(f"{run} is not a run folder: no {', '.join(names[:-1])} or {names[-1]}")
    steps, validation = read_recent(run / "metrics.jsonl", RECENT_LINES)
    jobs = list(_read_records(run / "jobs.jsonl", _JobEntry))
    jobs = [job for job in jobs if job["event"] != "end" or "code" in job]
    if now is None:
        now = file_system_time(run)
        beats, ahead = read_heartbeats_by_file_time(run)
    else:
        beats, ahead = read_heartbeats(run), {}
    jobs = without_refused(jobs, _pulse(beats))
    total = _total_steps(run)
    alive, reason = liveness(steps, jobs, now, total, beats)
    ends = {} if alive else _rank_ends(run, beats)
    run_end = None if alive or jobs else read_run_end(run)
    if run_end:
        reason = run_end.describe(now)
    codes = [code for code, _ in ends.values()] + ([run_end.code] if run_end else [])
    state = _state(run, alive, steps, total, jobs, beats, codes, now)
    if ends and not steps:
        rank, (code, line) = next(iter(ends.items()))
        reason = f"failed before the first step: rank {rank}, exit code {code}: {line}"
    clocks = {f"{_name(rank, beats)} {format_offset(ahead[rank])}": None for rank in ahead
              if abs(ahead[rank]) > CLOCK_LIMIT}  # fmt: skip
    if clocks:  # first, since it qualifies the times of the reason
        reason = f"by file times (the clock of {_shorten_list([*clocks])}): {reason}"
    label = {"running": "alive", "stalled": "stalled", "unknown": "?"}.get(state, "not running")
    lines = {"state": f"{label}: {reason}"}
    if steps:
        lines |= _progress(steps, total)
    bits = _number(validation or {}, "validation_bits_per_byte")
    if validation and bits is not None:
        lines["validation"] = f"{bits:.4f} bits per byte at step {validation['step']:,}"
    if alive and beats:
        lines["ranks"] = describe_ranks(beats, now, _stages(run))
    if slow := slow_ranks(run, beats):
        lines["slow ranks"] = slow
    lines["checkpoint"] = _checkpoint(run, now)
    if jobs or (starts := read_starts(run)):
        lines["restarts"] = _restarts(jobs) if jobs else f"{len(starts) - 1}"
    if jobs and alive and (until := jobs[-1].get("ends")):
        lines["job ends"] = f"in {format_duration(max(0, until - now))}"
    errors = [*_log_errors(run, jobs), *_hangs(run, now)]
    errors += [f"rank {r} ended with exit code {code}: {line}" for r, (code, line) in ends.items()]
    values = status_values(run, reason, steps, validation, total, jobs)
    shown = errors[-last_errors:] if last_errors else []
    values |= {"state": state, "exit_code": STATUS_CODES[state], "errors": shown, "time": now}
    return RunStatus(alive, lines, shown, state, values)


def _state(
    run: Path,
    alive: bool | None,
    steps: list[dict[str, Any]],
    total: int | None,
    jobs: list[dict[str, Any]],
    beats: Mapping[int, HeartbeatRecord],
    codes: list[int],
    now: float,
) -> RunState:
    seconds = [s for record in steps if isinstance(s := record.get("step_seconds"), float)]
    return classify(
        alive,
        finished=bool(steps and total and steps[-1]["step"] >= total),
        stalled=is_stalled(beats, now, seconds, _section(run, "watchdog")),
        job=jobs[-1] if jobs else None,
        queue=queue_state(jobs[-1]["job"]) if jobs else None,
        codes=[code for code in codes if code],
        beats=beats,
    )


def status_values(
    run: Path,
    reason: str,
    steps: list[dict[str, Any]],
    validation: dict[str, Any] | None,
    total: int | None,
    jobs: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the values of `hg-scale status --json` but for the state; null what is unknown."""
    last, seen = steps[-1] if steps else {}, validation or {}
    starts = read_starts(run)
    try:
        newest = find_latest(run / "checkpoints")
    except CheckpointError:
        newest = None
    journal = max(0, sum(job.get("event") == "start" for job in jobs) - 1)
    return {
        "run": str(run),
        "reason": reason,
        "steps": total,
        **{key: _number(last, key) for key in _JSON_STEP_KEYS},
        "seconds_left": seconds_left(steps, total),
        "validation_step": seen.get("step"),
        "validation_bits_per_byte": _number(seen, "validation_bits_per_byte"),
        "checkpoint": str(newest) if newest else None,
        "restarts": journal if jobs else max(0, len(starts) - 1),
        "job": jobs[-1].get("job") if jobs else last.get("job"),
        "job_ends": jobs[-1].get("ends") if jobs else None,
    }


def liveness(
    steps: list[dict[str, Any]],
    jobs: list[dict[str, Any]],
    now: float,
    total: int | None,
    beats: Mapping[int, HeartbeatRecord] = MappingProxyType({}),
) -> tuple[bool | None, str]:
    """Whether the run is alive, and the evidence: Slurm, heartbeats, or the last logged line."""
    pulse = _pulse(beats)
    beating = pulse is not None and now - pulse < STALE
    # While it still beats, a save or a validation after the last step is in progress.
    if steps and total and steps[-1]["step"] >= total and not beating:
        return False, "trained to the last step"
    last_job = jobs[-1] if jobs else None
    # A later heartbeat is of another job: this one was refused while that one was running.
    outlived = pulse is not None and last_job is not None and pulse > last_job["time"] + PERIOD
    if last_job and last_job["event"] == "end" and not outlived:
        return False, f"job {last_job['job']} {_describe_end(last_job)}"
    if last_job and (state := queue_state(last_job["job"])):
        return state == "RUNNING", f"job {last_job['job']} is {state}"
    if pulse is not None:
        ago = f"last heartbeat {format_duration(max(0, now - pulse))} ago"
        return beating, ago if beating else f"{ago}, which is too long"
    if beats:
        ago = format_duration(max(0, now - max(beat.time for beat in beats.values())))
        killed = [_name(rank, beats) for rank, beat in beats.items() if beat.killed]
        if not killed:
            return False, f"all ranks ended, {ago} ago"
        hung = any(beat.hung for beat in beats.values())
        how = "ended by the watchdog" if hung else "died without reporting an error"
        return False, f"{_shorten_list(killed)} {how}, last heartbeat {ago} ago"
    last = max((r["time"] for r in (*steps[-1:], *jobs[-1:]) if "time" in r), default=None)
    if last is None:
        return None, "nothing logged yet"
    silent, limit = max(0, now - last), QUIET_SECONDS
    intervals = [
        b["time"] - a["time"] for a, b in pairwise(steps[-11:]) if {"time"} <= a.keys() & b.keys()
    ]
    if intervals:
        limit = max(limit, QUIET_LINES * statistics.median(intervals))
    last_line = f"last line {format_duration(silent)} ago"
    return silent < limit, last_line if silent < limit else f"{last_line}, which is too long"


def _describe_end(end: dict[str, Any]) -> str:
    """Describe the end of a job, and whether it waits to be started again."""
    # Requeued by its script, or later by Slurm itself, for instance after a node failure.
    if end.get("requeued") or queue_state(end["job"]) == "PENDING":
        return f"ended: {meaning(end['code'])}, waiting to start again"
    saved = end["code"] == REQUEUE
    if slurm := _ENDINGS.get(end.get("state", "")):
        return slurm + (", saved" if saved else "")
    return "ended: " + ("saved, not requeued" if saved else meaning(end["code"]))


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


def _pulse(beats: Mapping[int, HeartbeatRecord]) -> float | None:
    """Return the time of the last heartbeat of a rank that may be alive."""
    running = [beat.time for beat in beats.values() if not beat.ended and not beat.killed]
    return max(running, default=None)


def format_offset(seconds: float) -> str:
    """Describe how a clock differs: `is 0:05:00 ahead`."""
    return f"is {format_duration(abs(seconds))} {'ahead' if seconds > 0 else 'behind'}"


def describe_ranks(beats: Mapping[int, HeartbeatRecord], now: float, stages: int = 1) -> str:
    """Describe what the ranks are doing, and which ranks the others wait for or which are gone."""
    world = max(beat.world_size for beat in beats.values())
    counts = Counter(beat.activity for beat in beats.values() if not beat.ended)
    activities = ", ".join(f"{count} of {world} {name}" for name, count in counts.most_common(3))
    since = format_duration(max(0, now - min(beat.since for beat in beats.values())))
    stalled = describe_stalled(beats, max(1, world // stages), now, silent=STALE)
    # Ranks are at different positions in any step; that means something only in a slow one.
    usual = max((beat.step_seconds or 0 for beat in beats.values()), default=0)
    slow = now - min(beat.since for beat in beats.values()) > max(STALE, 2 * usual)
    gone = len(beats) < world or any(b.ended or now - b.time > STALE for b in beats.values())
    return f"{activities}, for {since}" + (f"; {stalled}" if stalled and (slow or gone) else "")


def slow_ranks(run: Path, beats: Mapping[int, HeartbeatRecord]) -> str | None:
    """Describe the slow ranks of the last straggler table; None without a table."""
    with suppress(OSError, FormatError):
        path = run / "ranks" / "stragglers.json"
        table: _StragglerTable = validated(_StragglerTable, read_json(path, TABLE_BYTES))
        rows = sorted(table["ranks"], key=lambda row: -row["ratio"])
        slow = [row for row in rows if row["ratio"] >= table["threshold"] > 0]
        described = [
            f"{_name(row['rank'], beats)} {row['ratio']:.2f} x the median (data "
            f"{row['data_seconds']:.3g} s, forward {row['forward_seconds']:.3g} s per step)"
            for row in slow
        ]
        slowest = rows[0]
        none = f"none; {_name(slowest['rank'], beats)} takes {slowest['ratio']:.2f} x the median"
        return (_shorten_list(described) or none) + f", at step {table['step']:,}"
    return None


def _name(rank: int, beats: Mapping[int, HeartbeatRecord]) -> str:
    return f"rank {rank} ({beats[rank].host})" if rank in beats else f"rank {rank}"


def _shorten_list(names: list[str]) -> str:
    """Join the first names and the number of the others."""
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def queue_state(job: str) -> str | None:
    """Return Slurm's state of a job (7, or 7_2 of an array); None if it is unknown."""
    if shutil.which("squeue") is None:
        return None
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            ["squeue", "--noheader", "--format=%T", f"--jobs={job}", "--states=all"],
            capture_output=True, text=True, timeout=10, check=False,
        )  # fmt: skip
        return done.stdout.strip() or None
    return None


def _progress(steps: list[dict[str, Any]], total: int | None) -> dict[str, str]:
    last = steps[-1]
    of = f" of {total:,}" if total else ""
    lines = {"step": f"{last['step']:,}{of}"}
    if last.get("loss") is not None and last.get("bits_per_byte") is not None:
        lines["loss"] = f"{last['loss']:.4f}, {last['bits_per_byte']:.4f} bits per byte"
    if last.get("tokens_per_second"):
        lines["speed"] = f"{format_number(last['tokens_per_second'])} tokens/s"
        lines["speed"] += f", MFU {last['mfu']:.1%}" if last.get("mfu") is not None else ""
    if (left := seconds_left(steps, total)) is not None:
        lines["time left"] = format_duration(left)
    if last.get("skipped_steps"):
        lines["skipped"] = f"{last['skipped_steps']} bad steps"
    return lines


def _checkpoint(run: Path, now: float) -> str:
    skipped: list[str] = []
    try:
        newest = find_latest(run / "checkpoints", skipped.append)
    except CheckpointError as error:
        return str(error)
    if newest is None:
        return "none yet"
    age = now - (newest / "manifest.json").stat().st_mtime
    if age < -CLOCK_LIMIT:  # copied from elsewhere, or its file system's clock was changed
        dated = f"its file is dated {format_duration(-age)} ahead of now"
    else:
        dated = f"{format_duration(max(0, age))} ago"
    return "; ".join([f"{newest.name}, {dated}", *skipped])


def _restarts(jobs: list[dict[str, Any]]) -> str:
    starts = [job for job in jobs if job["event"] == "start"]
    last = max((n for n, job in enumerate(jobs) if job["event"] == "start"), default=0)
    ends = [meaning(job["code"]) for job in jobs[:last] if job["event"] == "end" and job["code"]]
    reasons = ", ".join(f"{ends.count(end)} x {end}" for end in dict.fromkeys(ends))
    return f"{max(0, len(starts) - 1)}" + (f" ({reasons})" if reasons else "")


def _log_errors(run: Path, jobs: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the newest job's log that contain an error word."""
    logs = [Path(job["log"]) for job in jobs if job.get("log")]
    if not logs or not logs[-1].is_file():
        return []
    with logs[-1].open("rb") as file:
        file.seek(max(0, logs[-1].stat().st_size - _TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return [line for line in lines if any(w.lower() in line.lower() for w in _ERROR_WORDS)]


def _hangs(run: Path, now: float) -> list[str]:
    """Return the last report of the watchdog, if there is one."""
    last = list(_read_records(run / "watchdog.jsonl", _WatchdogEntry))[-1:]
    return [f"watchdog, {format_duration(max(0, now - r['time']))} ago: {r['line']}" for r in last]


def _rank_ends(run: Path, beats: Mapping[int, HeartbeatRecord]) -> dict[int, tuple[int, str]]:
    """Return exit code and error of the ranks of the last start that ended by one of their own.

    Without a heartbeat the start failed before its first one, and all files are of that start.
    """
    ends = {}
    for path in sorted((run / "ranks").glob("rank-*.end")):
        with suppress(OSError, ValueError, FormatError):
            rank = int(path.stem.removeprefix("rank-"))
            end: EndEntry = validated(EndEntry, read_json(path, RECORD_BYTES))
            if rank in beats or not beats:
                ends[rank] = end["code"], end["line"]
    return ends


def _number(record: Mapping[str, Any], key: str) -> float | None:
    value = record.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _section(run: Path, name: str) -> dict[str, Any]:
    """Return a section of the run's configuration; empty where it has none."""
    with suppress(OSError, FormatError, KeyError):
        section = read_object(run / "config.json", TEXT_BYTES)[name]
        return section if isinstance(section, dict) else {}
    return {}


def _stages(run: Path) -> int:
    return _setting(run, "parallel", "pipeline") or 1


def _total_steps(run: Path) -> int | None:
    return _setting(run, "training", "steps")


def _setting(run: Path, section: str, key: str) -> int | None:
    """Return a count of the run's configuration; None if it cannot be read."""
    with suppress(FormatError, KeyError):
        return validated(Count, _section(run, section)[key])
    return None


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


class _StragglerTable(TypedDict):
    """The content of stragglers.json."""

    ranks: Annotated[list[_StragglerRow], Field(min_length=1)]
    threshold: FiniteFloat
    step: Count


class _WatchdogEntry(TypedDict):
    """A line of watchdog.jsonl."""

    time: float
    line: str


def _read_records(path: Path, kind: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file; incomplete lines are skipped."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(RECORD_BYTES):
            record = parse_record(line, kind)
            if record is not None:
                yield record
