"""Measurements of a run: `metrics.jsonl`, the time of a step by phase, and memory.

Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from hg_scale.bounded_read import parse_record, require_regular
from hg_scale.metrics_file import MAX_LINE

MetricsRecord = dict[str, Any]
StepPhase = Literal["data", "compute", "rest", "paused"]

RECENT_LINES = 20  # logged steps from which the time left is estimated
_GIB = 2**30


class MetricsLog:
    """Appends records to `metrics.jsonl` in `run_dir`, one JSON object per line.

    A killed run leaves lines of steps after its last checkpoint, and perhaps a partial line. Both
    are dropped when the run resumes after `resume_step` (0: from the start), so that the file has
    every step once. If lines cannot be written (a full disk) they are lost, and `warn` is called
    once.
    """

    def __init__(
        self, run_dir: Path, resume_step: int = 0, warn: Callable[[str], None] = print
    ) -> None:
        self._warn, self._warned = warn, False
        self._partial_line = False  # at the end of the file
        self.path = run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _drop_lines_after(self.path, resume_step)
        self._file = self.path.open("ab", buffering=0)  # one system call per line

    def write(self, record: Mapping[str, Any]) -> None:
        """Append `record` and the Unix time as `time`. Numbers that are not finite become null."""
        line = {**_jsonable(record), "time": round(time.time(), 3)}
        text = json.dumps(line, allow_nan=False) + "\n"
        data = ("\n" * self._partial_line + text).encode()
        try:
            written = self._file.write(data)
            self._partial_line = written < len(data)
            problem = "the disk is full" if self._partial_line else None
        except OSError as error:
            problem = error.strerror
        if problem and not self._warned:
            self._warned = True
            self._warn(f"{self.path}: lines are lost: {problem}; the run continues")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _drop_lines_after(path: Path, step: int) -> None:
    """Drop broken lines and those of steps after `step`, and replace the file atomically."""
    require_regular(path)
    if all(before == after for before, after in _cleaned_lines(path, step)):
        return
    temporary = path.with_suffix(".jsonl.tmp")
    with temporary.open("wb") as file:
        file.writelines(after for _, after in _cleaned_lines(path, step))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _cleaned_lines(path: Path, step: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield each line and what is kept of it, one at a time: a long run has gigabytes of them."""
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE + 1):
            keep = len(line) <= MAX_LINE and _is_up_to(line, step)
            yield line, line.rstrip(b"\n") + b"\n" if keep else b""


def _is_up_to(line: bytes, step: int) -> bool:
    record = parse_record(line)
    return record is not None and record.get("step", 0) <= step


def _jsonable(value: Any) -> Any:
    """Convert scalars of numpy and torch to Python numbers, and NaN and infinity to None."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def seconds_left(steps: Sequence[Mapping[str, Any]], total: int | None) -> float | None:
    """Estimate the seconds of training that are left, without validations and checkpoints.

    steps: the last RECENT_LINES records of steps. Only those of the last start count, and not its
    first one, which includes compilation. None if the number of steps is unknown, or nothing left.
    """
    if not steps or not total or steps[-1]["step"] >= total:
        return None
    start = steps[-1].get("start")
    recent = [record for record in steps if record.get("start") == start]
    seconds = [s for record in recent if (s := record.get("step_seconds"))]
    if len(recent) < RECENT_LINES:
        del seconds[:1]
    return (total - steps[-1]["step"]) * statistics.median(seconds) if seconds else None


class StepTimer:
    """Splits wall time into data wait, compute and the rest, averaged over the logged steps.

    Phases nest and every moment counts for the innermost: data wait inside compute (a pipeline
    reads its micro-batches there) is data wait. Measured on the host, so compute is correct only if
    the step ends by reading a number from the device, such as the loss.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._phase: StepPhase = "rest"
        self._mark = clock()
        self._reset()

    @contextmanager
    def measure(self, phase: StepPhase) -> Iterator[None]:
        """Count the time of this block for `phase`; `paused` (validation, saving) is in no step."""
        outer = self._phase
        self._switch(phase)
        try:
            yield
        finally:
            self._switch(outer)

    def count_step(self, tokens: int) -> None:
        """Count a finished step, in which all ranks together trained on `tokens`."""
        self._steps += 1
        self._tokens += tokens

    def collect(self) -> dict[str, float]:
        """Return averages since the last call: seconds per step by phase, and tokens per second.

        Empty if no step was counted.
        """
        self._switch(self._phase)
        seconds, steps, tokens = self._seconds, self._steps, self._tokens
        self._reset()
        if not steps:
            return {}
        total = seconds["data"] + seconds["compute"] + seconds["rest"]
        return {
            "step_seconds": total / steps,
            "data_seconds": seconds["data"] / steps,
            "compute_seconds": seconds["compute"] / steps,
            "rest_seconds": seconds["rest"] / steps,
            "tokens_per_second": tokens / total if total else math.nan,
        }

    def _switch(self, phase: StepPhase) -> None:
        now = self._clock()
        self._seconds[self._phase] += now - self._mark
        self._phase, self._mark = phase, now

    def _reset(self) -> None:
        self._seconds: defaultdict[StepPhase, float] = defaultdict(float)
        self._steps = self._tokens = 0


def memory_usage() -> dict[str, float]:
    """Return this rank's current and peak memory in GiB: of its GPU if it has one, else RSS."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    else:
        # KiB on Linux, bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        now = min(_resident(default=peak), peak)
    return {"memory_gib": now / _GIB, "peak_memory_gib": peak / _GIB}


def gpu_usage() -> dict[str, float]:
    """Return utilisation, power and temperature of this rank's GPU; nothing without NVML.

    torch reads them through the package nvidia-ml-py.
    """
    torch = sys.modules.get("torch")
    if torch is None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return {}
    readers = {
        "gpu_utilisation": lambda: torch.cuda.utilization() / 100,
        "gpu_power_watts": lambda: torch.cuda.power_draw() / 1000,
        "gpu_temperature": torch.cuda.temperature,
    }
    found = {}
    for key, read in readers.items():
        with suppress(Exception):  # no package, no driver, or a GPU that lacks the sensor
            found[key] = float(read())
    return found


def _resident(default: int) -> int:
    """Return the resident bytes of this process; `default` on systems without /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return default
    return pages * resource.getpagesize()
