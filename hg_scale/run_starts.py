"""The starts of a run: `RUN/starts.jsonl` has a line for each one that began to train.

Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from hg_scale.metrics_file import lines_backwards, step_record

_MAX_LINE = 1 << 16


@dataclass(frozen=True)
class RunStart:
    """A start: `start` counts from 1, `time` is when its process began, in seconds since 1970.

    job: of the scheduler, None without one. step: from which it resumed. ranks: processes.
    last_step, last_time: the last line that the starts before had logged; None at the first.
    """

    start: int
    time: float
    step: int
    ranks: int
    job: str | None = None
    last_step: int | None = None
    last_time: float | None = None


def record_start(run: Path, time: float, step: int, ranks: int) -> RunStart:
    """Append a line for the start that begins now; call it before old lines are dropped.

    Raises OSError.
    """
    last = next(filter(None, map(step_record, lines_backwards(run / "metrics.jsonl"))), {})
    earlier = read_starts(run)
    new = RunStart(
        start=1 + max((one.start for one in earlier), default=0),
        time=round(time, 3),
        step=step,
        ranks=ranks,
        job=job_id(os.environ),
        last_step=last.get("step"),
        last_time=last.get("time"),
    )
    with (run / "starts.jsonl").open("a") as file:
        file.write(json.dumps(asdict(new)) + "\n")
    return new


def read_starts(run: Path) -> list[RunStart]:
    """Return the starts in order; broken lines are skipped. Raises OSError."""
    path = run / "starts.jsonl"
    if not path.is_file():
        return []
    starts = []
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE):
            record = step_record(line)
            if record is not None and (start := _as_start(record)):
                starts.append(start)
    return starts


def _as_start(record: dict[str, Any]) -> RunStart | None:
    """Return the start of a line; None if a key is missing or has another type."""
    kinds: dict[str, tuple[type, ...]] = {
        "start": (int,), "time": (int, float), "step": (int,), "ranks": (int,),
        "job": (str, NoneType), "last_step": (int, NoneType), "last_time": (int, float, NoneType),
    }  # fmt: skip
    values = {key: record.get(key) for key in kinds}
    fits = all(type(values[key]) in kinds[key] for key in kinds)
    return RunStart(**values) if fits else None  # type: ignore[arg-type]


def job_id(environment: Mapping[str, str]) -> str | None:
    """Return Slurm's id of this job as in `jobs.jsonl`, 7 or 7_2 of an array; None outside one."""
    array, task = (environment.get(f"SLURM_ARRAY_{key}_ID") for key in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID")
