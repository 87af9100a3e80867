"""A profiler's trace and a memory snapshot of one step, on demand (`--profile STEP`)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

_ROWS = 40  # of the table of operations


class StepProfiler:
    """Profiles the one step `step` (None: none) of this rank into `RUN/profile/`.

    Files `step-N-rank-R` with the endings `.trace.json.gz` (ui.perfetto.dev shows it), `.txt`
    (operations by time) and, on a GPU, `.memory.pickle` (pytorch.org/memory_viz shows it), which is
    also written when the step fails, as for want of memory. A file that cannot be written is one
    warning.
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
        """Around step `step` of the loop; costs nothing in all but one."""
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
        table = profiler.key_averages().table(sort_by=order, row_limit=_ROWS)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            stem.with_suffix(".txt").write_text(table)
            profiler.export_chrome_trace(str(stem.with_suffix(".trace.json.gz")))
        except (OSError, RuntimeError) as error:
            self._warn(f"no profile of step {self._step}: {error}")

    @contextmanager
    def _memory_snapshot(self, path: Path) -> Iterator[None]:
        """Record every allocation on the GPU in here; torch has no public name for it yet."""
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
