"""The starts of a run, and what the lines that they drop had shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hg_scale.run_starts import RunStart, job_id, read_starts, record_start


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(key, raising=False)


def test_starts_are_counted_and_keep_the_last_line_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_starts(tmp_path) == []
    first = record_start(tmp_path, 100.0, 0, 2)
    assert first == RunStart(start=1, time=100.0, step=0, ranks=2)
    lines = [{"step": 10, "time": 150.5}, {"step": 20, "time": 190.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 30, "ti')
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    second = record_start(tmp_path, 300.0, 10, 4)
    expected = RunStart(2, 300.0, 10, 4, job="7", last_step=20, last_time=190.5)
    assert second == expected and read_starts(tmp_path) == [first, second]


@pytest.mark.parametrize(
    "broken",
    ['{"start": 3', "[]", '{"start": "3", "time": 1, "step": 1, "ranks": 1}', '{"step": 1}',
     '{"start": 3, "time": 1, "step": 1, "ranks": 1, "last_time": "x"}', "x" * 100_000],
)  # fmt: skip
def test_broken_lines_are_skipped(tmp_path: Path, broken: str) -> None:
    first = record_start(tmp_path, 100.0, 0, 2)
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write(broken + "\n")
    assert read_starts(tmp_path) == [first]
    assert record_start(tmp_path, 200.0, 0, 2).start == 2


def test_the_job_is_that_of_the_array_element() -> None:
    assert job_id({}) is None
    assert job_id({"SLURM_JOB_ID": "9"}) == "9"
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    assert job_id(array) == "7_2"
