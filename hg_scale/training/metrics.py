"""What a run measured: `metrics.jsonl`, where the time of a step went, and memory.

None of it imports torch.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

MetricsRecord = dict[str, Any]
StepPhase = Literal["data", "compute", "rest", "paused"]

_GIB = 2**30


class MetricsLog:
    """Appends one JSON object a line to `metrics.jsonl` in `run_dir`.

    A run that died leaves lines of steps after its last checkpoint, and perhaps half a line. Going
    on after `resume_step` (0: from the start) drops both, so that every step stands there once.
    Lines that cannot be written (a full disk) are lost, and `warn` says so once.
    """

    def __init__(
        self, run_dir: Path, resume_step: int = 0, warn: Callable[[str], None] = print
    ) -> None:
        self._warn, self._torn, self._lost = warn, False, False
        self.path = run_dir / "metrics.jsonl"
        run_dir.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _cut_back(self.path, resume_step)
        self._file = self.path.open("ab", buffering=0)  # a line, a write

    def write(self, record: Mapping[str, Any]) -> None:
        """Append `record` and the time of day in seconds since 1970.

        What is not finite becomes null, since JSON has no NaN.
        """
        line = {**_legal(record), "time": round(time.time(), 3)}
        text = json.dumps(line, allow_nan=False) + "\n"
        data = ("\n" * self._torn + text).encode()
        try:
            written = self._file.write(data)
            self._torn = written < len(data)
            fault = "the disk is full" if self._torn else None
        except OSError as error:
            fault = error.strerror
        if fault and not self._lost:
            self._lost = True
            self._warn(f"{self.path}: lines are lost: {fault}; the run goes on")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _cut_back(path: Path, step: int) -> None:
    """Drop broken lines and those of steps after `step`; the file is replaced whole or not."""
    before = path.read_bytes()
    kept = b"".join(line + b"\n" for line in before.split(b"\n") if _belongs(line, step))
    if kept == before:
        return
    temporary = path.with_suffix(".jsonl.tmp")
    with temporary.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _belongs(line: bytes, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and record.get("step", 0) <= step


def _legal(value: Any) -> Any:
    """`value` as JSON allows it; numbers of numpy and torch become Python's."""
    if isinstance(value, Mapping):
        return {str(key): _legal(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_legal(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class StepTimer:
    """Splits wall time into data wait, compute and the rest, averaged over the steps collected.

    Every moment counts for one phase only: waiting for data inside compute (a pipeline draws its
    micro-batches there) is data wait. Reads the host's clock, so compute is true where the step
    ends by reading a number off the device, as the loss.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._phase: StepPhase = "rest"
        self._mark = clock()
        self._reset()

    @contextmanager
    def measure(self, phase: StepPhase) -> Iterator[None]:
        """Time in here counts for `phase`; `paused` (validation, saving) is no part of a step."""
        outer = self._phase
        self._switch(phase)
        try:
            yield
        finally:
            self._switch(outer)

    def count_step(self, tokens: int) -> None:
        """A step is done, in which all ranks together trained on `tokens`."""
        self._steps += 1
        self._tokens += tokens

    def collect(self) -> dict[str, float]:
        """Averages since the last call: seconds a step by phase, and tokens a second.

        Empty where no step was counted.
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
    """Memory of this rank now and at its peak, in GiB: the GPU's where one is used, else RSS."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    else:
        # KiB on Linux, bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        now = min(_resident(default=peak), peak)
    return {"memory_gib": now / _GIB, "peak_memory_gib": peak / _GIB}


def _resident(default: int) -> int:
    """Bytes of this process in memory; `default` where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return default
    return pages * resource.getpagesize()
