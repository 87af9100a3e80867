"""Steps that a killed start had logged to `metrics.jsonl` but not to wandb, for `wandb_process.py`.

wandb keeps what a start logs in `RUN/wandb/*run-*/run-ID.wandb`: records of LevelDB's log format,
in blocks of 32 KiB, each fragment with a checksum, a length and a type.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hg_scale.metrics_file import MAX_LINE, step_record

_FILE_HEADER, _BLOCK = 7, 1 << 15
_FRAGMENT = struct.Struct("<IHB")  # checksum, length, type
_COMPLETE, _LAST = 1, 4
_MAX_RECORD = 1 << 24  # bytes


def logged_steps(run_dir: Path, name: str) -> set[int]:
    """Return the steps in wandb's files of earlier starts; `name` is wandb's id of the run."""
    from wandb.proto.wandb_internal_pb2 import Record

    steps = set()
    for path in (run_dir / "wandb").glob(f"*run-*-{name}/run-{name}.wandb"):
        for data in _records_of(path):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                steps.add(record.history.step.num)
    return steps


def missing_records(run_dir: Path, resume_step: int, known: set[int]) -> Iterator[dict[str, Any]]:
    """Yield the records of `metrics.jsonl` up to `resume_step` whose step is not among `known`."""
    path = run_dir / "metrics.jsonl"
    if not resume_step or not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE + 1):
            record = step_record(line)
            if record and record["step"] <= resume_step and record["step"] not in known:
                yield record


def _records_of(path: Path) -> Iterator[bytes]:
    """Yield the complete records; a killed start leaves a partial one at the end."""
    with path.open("rb") as file:
        position, parts = len(file.read(_FILE_HEADER)), b""
        while True:
            left = _BLOCK - position % _BLOCK
            if left < _FRAGMENT.size:
                position += len(file.read(left))
                continue
            head = file.read(_FRAGMENT.size)
            if len(head) < _FRAGMENT.size:
                return
            _, length, kind = _FRAGMENT.unpack(head)
            data = file.read(length)
            position += len(head) + len(data)
            if not kind or len(data) < length or len(parts) > _MAX_RECORD:
                return
            parts += data
            if kind in (_COMPLETE, _LAST):
                yield parts
                parts = b""
