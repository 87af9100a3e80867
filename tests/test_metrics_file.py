"""Reading `metrics.jsonl`: its end only, or its columns, whatever is in between."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from math import isnan
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hg_scale import metrics_file
from hg_scale.metrics_file import MAX_LINE, lines_backwards, read_columns, read_recent
from tests.run_folders import step_record, validation_record


@given(
    st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), max_size=30),
    st.integers(1, 50),
    st.booleans(),
)
def test_lines_backwards_are_the_lines(lines: list[bytes], block: int, ends: bool) -> None:
    path = Path(f"/dev/shm/lines-{id(lines)}")
    path.write_bytes(b"\n".join(lines) + b"\n" * ends)
    try:
        assert list(lines_backwards(path, block)) == [line for line in lines[::-1] if line]
    finally:
        path.unlink()


def test_a_limit_leaves_out_the_line_it_cuts(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"aaaa\nbbbb\ncccc\n")
    assert list(lines_backwards(path, 4, limit=7)) == [b"cccc"]
    assert list(lines_backwards(tmp_path / "none")) == []


def test_a_line_without_end_is_skipped_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with path.open("wb") as file:
        file.write(b'{"step": 1, "loss": 2.0}\n')
        file.write(b"x" * (3 * MAX_LINE))
        file.write(b'\n{"step": 2, "loss": 1.0}\n')
    assert [record["step"] for record in read_recent(path, 5)[0]] == [1, 2]
    table = read_columns(path, {"loss": ("step",)}, lambda error: error)["loss"]
    assert list(table["step"]) == [1, 2]


def write(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_end_has_the_last_steps_and_the_last_validation(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [step_record(n) for n in range(1, 101)]
    records.insert(30, validation_record(30))
    records.insert(51, validation_record(50))
    records += [{"step": None, "loss": 1}, 7, [], {"step": "8"}, {"step": 101, "skipped": "nan"}]
    write(path, records)
    with path.open("a") as file:
        file.write('{"step": 102, "lo')
    steps, validation = read_recent(path, 20)
    assert [record["step"] for record in steps] == list(range(81, 101))
    assert validation and validation["step"] == 50


def test_columns_have_nan_where_a_number_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    huge = 10**400
    write(path, [{"step": 1, "loss": 2}, {"step": 2, "loss": None}, {"step": 3, "loss": "x"},
                 {"step": 4, "loss": huge}, {"step": 5, "validation_loss": 0.5}])  # fmt: skip
    kinds = {"loss": ("step", "loss", "mfu"), "validation_loss": ("step", "validation_loss")}
    tables = read_columns(path, kinds, lambda error: error)
    assert list(tables["loss"]["step"]) == [1, 2, 3]  # 4 has a number that nobody logs
    assert [isnan(v) for v in tables["loss"]["loss"]] == [False, True, True]
    assert all(isnan(v) for v in tables["loss"]["mfu"])
    assert list(tables["validation_loss"]["validation_loss"]) == [0.5]


LINE = {**step_record(1), "epochs": {"corpus": 0.5}, "slowest_rank": 1, "slowest_ratio": 1.1}


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 200,000 logged lines, 70 MB."""
    run = tmp_path_factory.mktemp("long")
    (run / "config.json").write_text(json.dumps({"training": {"steps": 400_000}}))
    text = json.dumps(LINE).replace('"step": 1,', '"step": %d,', 1)
    with (run / "metrics.jsonl").open("w") as file:
        file.writelines(text % n + "\n" for n in range(1, 200_001))
    return run


def test_status_parses_only_the_end(long_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the file is, and whether or not it has a validation."""
    path = long_run / "metrics.jsonl"
    read = 0
    parse = metrics_file.parse_record

    def counted(line: bytes, kind: Any = None) -> Any:
        nonlocal read
        read += len(line)
        return parse(line, kind)

    monkeypatch.setattr(metrics_file, "parse_record", counted)
    steps, validation = read_recent(path, 20)
    assert steps[-1]["step"] == 200_000 and validation is None
    with path.open("a") as file:
        file.write(json.dumps(validation_record(200_000)) + "\n")
    steps, validation = read_recent(path, 20)
    assert steps[-1]["step"] == 200_000 and validation
    assert read < 32_000


def test_status_of_a_long_run_is_small_and_fast(long_run: Path) -> None:
    code = (
        "import sys; from hg_scale.commands.main import main; import time\n"
        "start = time.process_time(); main(['status', sys.argv[1]])\n"
        "seconds = time.process_time() - start\n"
        "status = open('/proc/self/status').read()\n"  # getrusage counts the parent before exec
        "print(seconds, int(status.split('VmHWM:')[1].split()[0]) / 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(long_run)], capture_output=True, text=True, check=True
    )
    seconds, peak = map(float, done.stdout.split()[-2:])
    assert "200,000 of 400,000" in done.stdout
    assert peak < 100 and seconds < 2


def test_columns_of_a_long_run_are_small(long_run: Path) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    keys = ("step", "loss", "mfu", "tokens")
    table = read_columns(long_run / "metrics.jsonl", {"loss": keys}, lambda error: error)["loss"]
    assert len(table) == 200_000 and table["step"][-1] == 200_000
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 40_000  # KiB; 200,000 dictionaries take 200 MB
    assert time.process_time() - start < 20
