"""Slow ranks, by their own time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hg_scale.training.monitoring.heartbeat import Heartbeat, clear_ranks, read_heartbeats
from hg_scale.training.monitoring.stragglers import RankTimer, Stragglers, compare_within_stages
from tests.runs import records, train_in
from tests.world import Worlds

CPU = torch.device("cpu")


def test_ranks_are_compared_with_the_median_of_their_stage() -> None:
    ratios, medians = compare_within_stages([1.0, 2.0, 1.0, 1.0, 8.0, 4.0, 4.0, 2.0], per_stage=4)
    assert medians == [1.0, 4.0]
    assert ratios == [1.0, 2.0, 1.0, 1.0, 2.0, 1.0, 1.0, 0.5]
    assert compare_within_stages([1.0, 1.5], 2) == ([1.0, 1.5], [1.0])  # the lower median
    assert compare_within_stages([0.0, 3.0], 1) == ([1.0, 1.0], [0.0, 3.0])


def test_timer_measures_reading_and_forward_in_training_mode(tmp_path: Path) -> None:
    positions: list[Any] = []
    heartbeat = Heartbeat(tmp_path, 0, 1, print)

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            positions.append((heartbeat.position.work, heartbeat.position.turns))
            time.sleep(0.02)
            return x

    module = Slow()
    timer = RankTimer(heartbeat, CPU)
    timer.attach(module)
    for step in (1, 2):
        heartbeat.enter("step", step)
        with timer.reading():
            positions.append((heartbeat.position.work, heartbeat.position.turns))
            time.sleep(0.05)
        module(torch.zeros(1))
        module(torch.zeros(1))
    module.eval()
    module(torch.zeros(1))
    data, forward = timer.collect()
    # Means over two steps, of one reading and of two forwards each; sleeps are never shorter.
    assert data >= 0.05 and forward >= 0.04
    assert positions == [("data", 1), ("forward", 3), ("forward", 5)] * 2 + [("forward", 7)]
    assert timer.collect() == (0.0, 0.0)


class FixedTimer:
    """A stand-in for `RankTimer` with given times."""

    def __init__(self, times: list[tuple[float, float]]) -> None:
        self.times = iter(times)

    def collect(self) -> tuple[float, float]:
        return next(self.times)


def slow_on_rank_1(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Log ten steps; rank 1 is slow in the 1st, 3rd to 8th and 10th. Records and warnings."""
    rank, warnings = torch.distributed.get_rank(), []  # type: ignore[var-annotated]
    slow = [True, False, *[True] * 6, False, True]
    times = [(0.25, 0.5) if s and rank == 1 else (0.0, 0.5) for s in slow]
    heartbeat = Heartbeat(folder, rank, 3, print)
    heartbeat.enter("step", 7)
    timer: Any = FixedTimer(times)
    stragglers = Stragglers(heartbeat, timer, CPU, 3, 1.3, warnings.append)
    records = [stragglers.record() for _ in times]
    assert heartbeat.own_seconds == {"data_seconds": times[-1][0], "forward_seconds": 0.5}
    if rank == 0:
        clear_ranks(folder)
        heartbeat.beat()
    return records, warnings


def test_a_rank_that_stays_slow_warns_once(
    worlds: Worlds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = worlds.run(3, slow_on_rank_1, tmp_path)
    for logged, _ in results:
        ratios = [record["slowest_ratio"] for record in logged]
        assert ratios == [1.5, 1.0, *[1.5] * 6, 1.0, 1.5]
        assert [r["slowest_rank"] for r in logged if r["slowest_ratio"] > 1] == [1] * 8
    assert [len(warnings) for _, warnings in results] == [0, 1, 0]
    (line,) = results[1][1]
    assert "is slow, 1.50 x the median of its pipeline stage: 0.25 s of reading data and " in line
    assert line.endswith(" and 0.5 s of forward per step, median 0.5 s in all")
    table = json.loads((tmp_path / "ranks" / "stragglers.json").read_text())
    assert (table["step"], table["threshold"]) == (7, 1.3)
    assert table["ranks"][1] == {
        "rank": 1, "data_seconds": 0.25, "forward_seconds": 0.5, "ratio": 1.5,
    }  # fmt: skip


def test_a_single_rank_has_no_table(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 0, 1, print)
    stragglers = Stragglers(heartbeat, RankTimer(heartbeat, CPU), CPU, 1, 1.3, print)
    assert stragglers.record() == {} and heartbeat.table is None


def test_pipeline_stages_are_timed_but_not_compared(
    worlds: Worlds, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    sets = ("--set", "parallel.pipeline=2", "--set", "training.steps=3")
    done = train_in(worlds, 2, tmp_path, "--config", str(config), "--run", str(run), *sets)
    assert done.code == 0, done.output
    steps = [record for record in records(run) if "loss" in record]
    assert [(r["slowest_rank"], r["slowest_ratio"]) for r in steps] == [(0, 1.0)] * 3
    table = json.loads((run / "ranks" / "stragglers.json").read_text())
    assert table["step"] == 3 and all(row["forward_seconds"] > 0 for row in table["ranks"])
    beats = read_heartbeats(run)
    assert [(b.phase, b.step, b.ended) for b in beats.values()] == [("end", 3, True)] * 2
    assert not list((run / "ranks").glob("*.stacks")) and not (run / "stacks").exists()
