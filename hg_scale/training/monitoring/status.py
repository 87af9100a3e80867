"""State of a run, read from the files of its folder on any machine that sees them; no torch."""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.find import find_latest
from hg_scale.exit_codes import REQUEUE, meaning
from hg_scale.formats import format_duration, format_number
from hg_scale.training.metrics import seconds_left
from hg_scale.training.monitoring.heartbeat import PERIOD, STALE, HeartbeatRecord
from hg_scale.training.monitoring.run_end import read_run_end
from hg_scale.training.monitoring.run_records import RunRecords, last_pulse
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
    records = RunRecords.read(run, now)
    steps, jobs, beats, now = records.steps, records.jobs, records.beats, records.now
    alive, reason = liveness(steps, jobs, now, records.total_steps, beats)
    ends = {} if alive else records.rank_ends()
    run_end = None if alive or jobs else read_run_end(run)
    if run_end:
        reason = run_end.describe(now)
    codes = [code for code, _ in ends.values()] + ([run_end.code] if run_end else [])
    state = _state(records, alive, [code for code in codes if code])
    if ends and not steps:
        rank, (code, line) = next(iter(ends.items()))
        reason = f"failed before the first step: rank {rank}, exit code {code}: {line}"
    reason = _describe_clocks(records) + reason
    newest, checkpoint = _checkpoint(run, now)
    label = {"running": "alive", "stalled": "stalled", "unknown": "?"}.get(state, "not running")
    lines = {"state": f"{label}: {reason}", **_progress(records)}
    if alive and beats:
        lines["ranks"] = describe_ranks(beats, now, records.stages)
    if slow := slow_ranks(records):
        lines["slow ranks"] = slow
    lines["checkpoint"] = checkpoint
    if jobs or records.starts:
        lines["restarts"] = f"{_restart_count(records)}{_restart_reasons(jobs)}"
    if jobs and alive and (until := jobs[-1].get("ends")):
        lines["job ends"] = f"in {format_duration(max(0, until - now))}"
    errors = _log_errors(jobs)
    if hang := records.last_hang():
        ago = format_duration(max(0, now - hang["time"]))
        errors.append(f"watchdog, {ago} ago: {hang['line']}")
    errors += [f"rank {r} ended with exit code {code}: {line}" for r, (code, line) in ends.items()]
    shown = errors[-last_errors:] if last_errors else []
    values = status_values(records, reason, newest)
    values |= {"state": state, "exit_code": STATUS_CODES[state], "errors": shown, "time": now}
    return RunStatus(alive, lines, shown, state, values)


def _state(records: RunRecords, alive: bool | None, codes: list[int]) -> RunState:
    steps, jobs, total = records.steps, records.jobs, records.total_steps
    seconds = [s for record in steps if isinstance(s := record.get("step_seconds"), float)]
    return classify(
        alive,
        finished=bool(steps and total and steps[-1]["step"] >= total),
        stalled=is_stalled(records.beats, records.now, seconds, records.section("watchdog")),
        job=jobs[-1] if jobs else None,
        queue=queue_state(jobs[-1]["job"]) if jobs else None,
        codes=codes,
        beats=records.beats,
    )


def _describe_clocks(records: RunRecords) -> str:
    """Describe the clocks that differ, in front of the evidence whose times they qualify."""
    clocks = {
        f"{_name(rank, records.beats)} {format_offset(seconds)}": None
        for rank, seconds in records.ahead.items()
        if abs(seconds) > CLOCK_LIMIT
    }
    return f"by file times (the clock of {_shorten_list([*clocks])}): " if clocks else ""


def status_values(records: RunRecords, reason: str, newest: Path | None) -> dict[str, Any]:
    """Return the values of `hg-scale status --json` but for the state; null what is unknown.

    newest: the newest checkpoint.
    """
    steps, jobs, total = records.steps, records.jobs, records.total_steps
    last, seen = steps[-1] if steps else {}, records.validation or {}
    return {
        "run": str(records.run),
        "reason": reason,
        "steps": total,
        **{key: _number(last, key) for key in _JSON_STEP_KEYS},
        "seconds_left": seconds_left(steps, total),
        "validation_step": seen.get("step"),
        "validation_bits_per_byte": _number(seen, "validation_bits_per_byte"),
        "checkpoint": str(newest) if newest else None,
        "restarts": _restart_count(records),
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
    pulse = last_pulse(beats)
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


def slow_ranks(records: RunRecords) -> str | None:
    """Describe the slow ranks of the last straggler table; None without a table."""
    table, beats = records.stragglers(), records.beats
    if table is None:
        return None
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


def _progress(records: RunRecords) -> dict[str, str]:
    """Describe the last logged step and validation."""
    steps, total = records.steps, records.total_steps
    lines: dict[str, str] = {}
    if steps:
        lines |= _describe_step(steps, total)
    bits = _number(records.validation or {}, "validation_bits_per_byte")
    if records.validation and bits is not None:
        step = records.validation["step"]
        lines["validation"] = f"{bits:.4f} bits per byte at step {step:,}"
    return lines


def _describe_step(steps: list[dict[str, Any]], total: int | None) -> dict[str, str]:
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


def _checkpoint(run: Path, now: float) -> tuple[Path | None, str]:
    """Return the newest complete checkpoint, and describe it and the incomplete ones after it."""
    skipped: list[str] = []
    try:
        newest = find_latest(run / "checkpoints", skipped.append)
    except CheckpointError as error:
        return None, str(error)
    if newest is None:
        return None, "none yet"
    age = now - (newest / "manifest.json").stat().st_mtime
    if age < -CLOCK_LIMIT:  # copied from elsewhere, or its file system's clock was changed
        dated = f"its file is dated {format_duration(-age)} ahead of now"
    else:
        dated = f"{format_duration(max(0, age))} ago"
    return newest, "; ".join([f"{newest.name}, {dated}", *skipped])


def _restart_count(records: RunRecords) -> int:
    """Return how often the run was started again: by its jobs, or else by all of its starts."""
    jobs = sum(job["event"] == "start" for job in records.jobs)
    return max(0, (jobs if records.jobs else len(records.starts)) - 1)


def _restart_reasons(jobs: list[dict[str, Any]]) -> str:
    last = max((n for n, job in enumerate(jobs) if job["event"] == "start"), default=0)
    ends = [meaning(job["code"]) for job in jobs[:last] if job["event"] == "end" and job["code"]]
    reasons = ", ".join(f"{ends.count(end)} x {end}" for end in dict.fromkeys(ends))
    return f" ({reasons})" if reasons else ""


def _log_errors(jobs: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the newest job's log that contain an error word."""
    logs = [Path(job["log"]) for job in jobs if job.get("log")]
    if not logs or not logs[-1].is_file():
        return []
    with logs[-1].open("rb") as file:
        file.seek(max(0, logs[-1].stat().st_size - _TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return [line for line in lines if any(w.lower() in line.lower() for w in _ERROR_WORDS)]


def _number(record: Mapping[str, Any], key: str) -> float | None:
    value = record.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None
