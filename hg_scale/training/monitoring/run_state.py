"""The state of a run in one word, with the exit code of `hg-scale status` for it; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import ValidationError

from hg_scale.config.training_sections import WatchdogConfig
from hg_scale.exit_codes import DONE, REQUEUE, starts_again
from hg_scale.training.monitoring.heartbeat import STALE, HeartbeatRecord
from hg_scale.training.monitoring.watchdog import hang_limit

RunState = Literal[
    "running", "finished", "waiting", "stalled", "dead", "failed", "saved", "cancelled", "unknown"
]

STATUS_CODES: dict[RunState, int] = {
    "running": 0,
    "finished": 10,
    "waiting": 11,
    "stalled": 20,
    "dead": 21,
    "failed": 22,
    "saved": 23,
    "cancelled": 24,
    "unknown": 25,
}
"""From 20 on, somebody has to look at the run. 1, 2, 130 and 141 are those of every verb."""


def classify(
    alive: bool | None,
    *,
    finished: bool,
    stalled: bool,
    job: Mapping[str, Any] | None,
    queue: str | None,
    codes: Sequence[int],
    beats: Mapping[int, HeartbeatRecord],
) -> RunState:
    """Return the state of a run.

    alive: of `liveness`. finished: whether it has logged the last step. job: the last line of
    `jobs.jsonl`, and `queue` Slurm's state of that job. codes: exit codes of ranks that ended by an
    error of their own.
    """
    if alive:
        return "stalled" if stalled else "running"
    if finished:
        return "finished"
    if queue in ("PENDING", "CONFIGURING", "REQUEUED") or (job or {}).get("requeued"):
        return "waiting"
    if "CANCELLED" in (queue or "") or (job or {}).get("state") == "CANCELLED":
        return "cancelled"
    if job and job.get("event") == "end" and isinstance(code := job.get("code"), int):
        return _of_code(code)
    if codes:
        return _of_code(codes[0])
    if beats:
        ended = all(beat.ended for beat in beats.values())
        return "saved" if ended else "dead"
    return "unknown" if alive is None else "dead"


def _of_code(code: int) -> RunState:
    if code == DONE:
        return "finished"
    if code == REQUEUE:
        return "saved"
    return "dead" if starts_again(code) else "failed"


def is_stalled(
    beats: Mapping[int, HeartbeatRecord],
    now: float,
    step_seconds: Sequence[float],
    watchdog: Any,
) -> bool:
    """Whether the ranks still beat but take longer than the watchdog allows, or beat no more.

    step_seconds: of recent logged steps. watchdog: that section of config.json, of any version.
    """
    if not beats:
        return False
    try:
        config = WatchdogConfig.model_validate(watchdog or {})
    except ValidationError:
        config = WatchdogConfig()
    if not config.factor:  # off: it would not end the run, but the user wants to know
        config = WatchdogConfig()
    newest = max(beats.values(), key=lambda beat: beat.since)
    limit = hang_limit(config, newest.phase, list(step_seconds)).seconds
    silent = now - max(beat.time for beat in beats.values())
    return now - newest.since > limit + STALE or silent > limit + STALE
