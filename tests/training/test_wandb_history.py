"""A killed start: the steps that wandb lacks are filled in, and each is there once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from hg_scale.training.wandb_history import _records_of, logged_steps, missing_records
from hg_scale.training.wandb_log import run_id

CHILD = """
import sys
from pathlib import Path
from hg_scale.training.wandb_log import WandbLog
run, first, last, resume = Path(sys.argv[1]), *map(int, sys.argv[2:])
log = WandbLog(run, "hg", mode="offline", warn=print, resume_step=resume)
for step in range(first, last + 1):
    log.log({"step": step, "loss": 1 / step, "note": "x" * 3000})
log.finish()
"""


def log_steps(run: Path, first: int, last: int, resume: int = 0) -> None:
    command = [sys.executable, "-c", CHILD, str(run), *map(str, (first, last, resume))]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def steps_of(path: Path) -> list[int]:
    from wandb.proto.wandb_internal_pb2 import Record

    records = [Record.FromString(data) for data in _records_of(path)]
    return [record.history.step.num for record in records if record.HasField("history")]


def test_steps_of_a_killed_start_are_filled_in(tmp_path: Path) -> None:
    log_steps(tmp_path, 1, 20)
    name = run_id(tmp_path)
    (first,) = (tmp_path / "wandb").glob(f"offline-run-*/run-{name}.wandb")
    assert steps_of(first) == list(range(1, 21))
    assert first.stat().st_size > 2 * (1 << 15)  # records cross blocks
    first.write_bytes(first.read_bytes()[: 1 << 15])  # what a kill leaves
    kept = steps_of(first)
    assert kept == list(range(1, kept[-1] + 1)) and 3 < kept[-1] < 15
    lines = [{"step": n, "loss": 1 / n} for n in range(1, 21)] + [{"step": 4, "validation_loss": 1}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 3')
    log_steps(tmp_path, 16, 18, resume=15)
    files = (tmp_path / "wandb").glob(f"offline-run-*/run-{name}.wandb")
    (second,) = (file for file in files if file != first)
    assert steps_of(second) == list(range(kept[-1] + 1, 19))
    assert logged_steps(tmp_path, name) == set(range(1, 19))


def test_nothing_is_missing_at_the_first_start(tmp_path: Path) -> None:
    assert list(missing_records(tmp_path, 5, set())) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert list(missing_records(tmp_path, 0, set())) == []
    assert [record["step"] for record in missing_records(tmp_path, 1, set())] == [1]
