"""Profile one step of a run (`--profile STEP`): trace, table of operators, memory snapshot."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

_TABLE_ROWS = 40


class StepProfiler:
    """Profiles step `step` (None: no step) of this rank into `RUN/profile/`.

    Writes `step-N-rank-R.trace.json.gz` (for ui.perfetto.dev), `.txt` (operators by time) and, on a
    GPU, `.memory.pickle` (for pytorch.org/memory_viz), the latter also if the step fails, such as
    out of memory. A file that cannot be written is a warning.
    """

    def __init__(
        self,
        run_dir: Path,
        step: int | None,
        rank: int = 0,
        warn: Callable[[str], None] = lambda message: print(message, file=sys.stderr),
    ) -> None:
        self.folder, self._step, self._rank, self._warn = run_dir / "profile", step, rank, warn

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Profile the code of this block if `step` is the chosen step."""
        if step != self._step:
            yield
            return
        stem = self.folder / f"step-{step}-rank-{self._rank}"
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        with self._memory_snapshot(stem.with_suffix(".memory.pickle")):
            with profile(
                activities=activities, record_shapes=True, profile_memory=True, acc_events=True
            ) as profiler:
                yield
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            self._write(profiler, stem)

    def _write(self, profiler: profile, stem: Path) -> None:
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=_TABLE_ROWS)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            stem.with_suffix(".txt").write_text(table)
            profiler.export_chrome_trace(str(stem.with_suffix(".trace.json.gz")))
        except (OSError, RuntimeError) as error:
            self._warn(f"no profile of step {self._step}: {error}")

    @contextmanager
    def _memory_snapshot(self, path: Path) -> Iterator[None]:
        """Record every GPU allocation in this block; torch has no public function for it yet."""
        recording = torch.cuda.is_available()
        if recording:
            try:
                torch.cuda.memory._record_memory_history()
            except (AttributeError, RuntimeError) as error:
                self._warn(f"no memory snapshot of step {self._step}: {error}")
                recording = False
        try:
            yield
        finally:
            if recording:
                self._dump(path)

    def _dump(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
            torch.cuda.memory._record_memory_history(enabled=None)
        except (OSError, AttributeError, RuntimeError) as error:
            self._warn(f"no memory snapshot of step {self._step}: {error}")
