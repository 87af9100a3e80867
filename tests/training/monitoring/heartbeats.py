"""Heartbeat records made by hand."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from hg_scale.atomic_write import write_json
from hg_scale.training.monitoring.heartbeat import HeartbeatRecord

NOW = 1_000_000.0
HEALTHY: dict[str, Any] = {
    "world_size": 4, "pid": 1, "time": NOW - 2, "step": 120, "phase": "step", "work": "",
    "turns": 4, "since": NOW - 10,
}  # fmt: skip


def make_beats(*changes: dict[str, Any]) -> dict[int, HeartbeatRecord]:
    """Return a healthy record changed by each of `changes`, for ranks on hosts n0, n1, ..."""
    beats = {}
    for rank, change in enumerate(changes):
        values = {**HEALTHY, "world_size": len(changes), **change}
        beats[rank] = HeartbeatRecord(rank=rank, host=f"n{rank}", **values)
    return beats


def write_beats(run: Path, beats: dict[int, HeartbeatRecord]) -> None:
    """Write the heartbeat files as the ranks do."""
    (run / "ranks").mkdir(parents=True, exist_ok=True)
    for rank, beat in beats.items():
        write_json(run / "ranks" / f"rank-{rank:05}.json", asdict(beat))
