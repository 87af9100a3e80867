"""The profiler records one step and no other."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from hg_scale.training.profiling import StepProfiler


def work() -> torch.Tensor:
    return torch.randn(32, 32) @ torch.randn(32, 32)


def names(folder) -> set[str]:
    return {file.name for file in folder.glob("*")}


def test_one_step_is_profiled(tmp_path):
    profiler = StepProfiler(tmp_path, step=2, rank=5)
    for step in (1, 2, 3):
        with profiler.step(step):
            work()
        if step == 1:
            assert not profiler.folder.exists()
    assert names(tmp_path / "profile") >= {"step-2-rank-5.txt", "step-2-rank-5.trace.json.gz"}
    assert "aten::mm" in (tmp_path / "profile" / "step-2-rank-5.txt").read_text()
    with gzip.open(tmp_path / "profile" / "step-2-rank-5.trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 1


def test_without_a_step_nothing_is_profiled(tmp_path):
    profiler = StepProfiler(tmp_path, step=None)
    for step in range(4):
        with profiler.step(step):
            work()
    assert not profiler.folder.exists()


def test_an_error_in_the_step_is_raised(tmp_path):
    with pytest.raises(KeyError), StepProfiler(tmp_path, step=1).step(1):
        raise KeyError


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    warnings: list[str] = []
    with StepProfiler(tmp_path, step=1, warn=warnings.append).step(1):
        work()
    assert warnings and warnings[0].startswith("no profile of step 1: ")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_memory_snapshot_is_written_even_if_the_step_fails(tmp_path):
    profiler = StepProfiler(tmp_path, step=1)
    with pytest.raises(RuntimeError), profiler.step(1):
        torch.randn(1024, device="cuda")
        raise RuntimeError("out of memory")
    assert (tmp_path / "profile" / "step-1-rank-0.memory.pickle").stat().st_size > 0
