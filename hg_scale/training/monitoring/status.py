"""State of a run, read from the files of its folder on any machine that sees them; no torch."""

from __future__ import annotations

import json
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
from typing import Any

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.find import find_latest
from hg_scale.errors import UserError
from hg_scale.exit_codes import REQUEUE, meaning
from hg_scale.training.console import format_duration, format_rate
from hg_scale.training.monitoring.heartbeat import (
    PERIOD,
    STALE,
    HeartbeatRecord,
    file_system_time,
    read_heartbeats,
    read_heartbeats_by_file_time,
)
from hg_scale.training.monitoring.run_end import read_run_end
from hg_scale.training.monitoring.stalled_ranks import describe_stalled

QUIET_LINES, QUIET_SECONDS = 10, 600  # a run that logs nothing for both counts as dead
CLOCK_LIMIT = 30  # seconds by which a clock may differ before it is mentioned
_MAX_NAMED = 4  # ranks named in a line
_ENDINGS = {"CANCELLED": "was cancelled", "TIMEOUT": "reached its time limit"}
_TAIL_BYTES = 64 * 1024
_ERROR_WORDS = ("error", "Traceback", "warning", "exit code", "Killed", "CANCELLED", "not saved")


@dataclass(frozen=True)
class RunStatus:
    """Output of `hg-scale status`: `lines` by label. `alive` is None if the files do not tell."""

    alive: bool | None
    lines: dict[str, str]
    errors: list[str]


def read_status(run: Path, now: float | None = None, last_errors: int = 5) -> RunStatus:
    """Read the status of a run folder. Raises UserError.

    `now`: seconds since 1970, by the clock of the ranks' records. None: the present, by the times
    that the file system of `run` gives, since the clocks of hosts differ.
    """
    names = ("config.json", "metrics.jsonl", "jobs.jsonl", "ranks")
    if not any((run / name).exists() for name in names):
        raise UserError(f"{run} is not a run folder: no {', '.join(names[:-1])} or {names[-1]}")
    records = list(_read_records(run / "metrics.jsonl"))
    jobs = list(_read_records(run / "jobs.jsonl"))
    if now is None:
        now = file_system_time(run)
        beats, ahead = read_heartbeats_by_file_time(run)
    else:
        beats, ahead = read_heartbeats(run), {}
    jobs = without_refused(jobs, _pulse(beats))
    steps = [record for record in records if "loss" in record]
    total = _total_steps(run)
    alive, reason = liveness(steps, jobs, now, total, beats)
    if not alive and not jobs and (end := read_run_end(run)):
        reason = end.describe(now)
    state = "alive" if alive else "not running" if alive is False else "?"
    clocks = {f"{_name(rank, beats)} {format_offset(ahead[rank])}": None for rank in ahead
              if abs(ahead[rank]) > CLOCK_LIMIT}  # fmt: skip
    if clocks:  # first, since it qualifies the times of the reason
        reason = f"by file times (the clock of {_shorten_list([*clocks])}): {reason}"
    lines = {"state": f"{state}: {reason}"}
    if steps:
        lines |= _progress(steps, total)
    validations = [record for record in records if "validation_loss" in record]
    if validations:
        last = validations[-1]
        lines["validation"] = (
            f"{last['validation_bits_per_byte']:.4f} bits per byte at step {last['step']:,}"
        )
    if alive and beats:
        lines["ranks"] = describe_ranks(beats, now, _stages(run))
    if slow := slow_ranks(run, beats):
        lines["slow ranks"] = slow
    lines["checkpoint"] = _checkpoint(run, now)
    if jobs:
        lines["restarts"] = _restarts(jobs)
        if alive and (ends := jobs[-1].get("ends")):
            lines["job ends"] = f"in {format_duration(max(0, ends - now))}"
    ends = [] if alive else _rank_ends(run, beats)
    errors = [*_log_errors(run, jobs), *_hangs(run, now), *ends]
    return RunStatus(alive, lines, errors[-last_errors:])


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
    intervals = [b["time"] - a["time"] for a, b in pairwise(steps[-11:])]
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
    with suppress(OSError, ValueError, KeyError, TypeError):
        table = json.loads((run / "ranks" / "stragglers.json").read_text())
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
    if last.get("loss") is not None:
        lines["loss"] = f"{last['loss']:.4f}, {last['bits_per_byte']:.4f} bits per byte"
    if last.get("tokens_per_second"):
        lines["speed"] = f"{format_rate(last['tokens_per_second'])} tokens/s"
        lines["speed"] += f", MFU {last['mfu']:.1%}" if last.get("mfu") is not None else ""
    seconds = [r["step_seconds"] for r in steps[-20:] if r.get("step_seconds")]
    if total and seconds and last["step"] < total:
        lines["time left"] = format_duration((total - last["step"]) * statistics.median(seconds))
    if last.get("skipped_steps"):
        lines["skipped"] = f"{last['skipped_steps']} bad steps"
    return lines


def _checkpoint(run: Path, now: float) -> str:
    try:
        newest = find_latest(run / "checkpoints")
    except CheckpointError as error:
        return str(error)
    if newest is None:
        return "none yet"
    age = now - (newest / "manifest.json").stat().st_mtime
    if age < -CLOCK_LIMIT:  # copied from elsewhere, or its file system's clock was changed
        return f"{newest.name}, its file is dated {format_duration(-age)} ahead of now"
    return f"{newest.name}, {format_duration(max(0, age))} ago"


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
    last = list(_read_records(run / "watchdog.jsonl"))[-1:]
    return [f"watchdog, {format_duration(max(0, now - r['time']))} ago: {r['line']}" for r in last]


def _rank_ends(run: Path, beats: Mapping[int, HeartbeatRecord]) -> list[str]:
    """Return the errors of ranks of the last start that ended by an error of their own."""
    ends = []
    for rank in sorted(beats):
        with suppress(OSError, ValueError, KeyError, TypeError):
            end = json.loads((run / "ranks" / f"rank-{rank:05}.end").read_text())
            ends.append(f"rank {rank} ended with exit code {int(end['code'])}: {end['line']}")
    return ends


def _stages(run: Path) -> int:
    with suppress(OSError, ValueError, KeyError):
        return json.loads((run / "config.json").read_text())["parallel"]["pipeline"]
    return 1


def _total_steps(run: Path) -> int | None:
    with suppress(OSError, ValueError, KeyError):
        return json.loads((run / "config.json").read_text())["training"]["steps"]
    return None


def _read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file; incomplete lines are skipped."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record
