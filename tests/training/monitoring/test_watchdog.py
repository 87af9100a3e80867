"""When the watchdog ends a rank, and what it writes. Real runs that hang: tests/faults."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

from hg_scale.config.data_section import DataConfig
from hg_scale.config.training_sections import WatchdogConfig
from hg_scale.training.monitoring.heartbeat import (
    Heartbeat,
    RankPosition,
    clear_ranks,
    read_heartbeats,
)
from hg_scale.training.monitoring.watchdog import (
    HangLimit,
    Watchdog,
    clear_alarm,
    describe_hang,
    hang_limit,
    heartbeat_period,
)
from tests.training.monitoring.heartbeats import make_beats


def config(**keys: Any) -> WatchdogConfig:
    return WatchdogConfig(**keys)


def test_limits_by_phase() -> None:
    assert hang_limit(config(), "step", [9.0, 31.0]) == HangLimit(1800, "first")
    assert hang_limit(config(first=5.0), "step", []) == HangLimit(300, "first")
    assert hang_limit(config(), "step", [600.0, 31.0, 31.0]) == HangLimit(310, "factor", 31)
    assert hang_limit(config(), "step", [1.0] * 50) == HangLimit(300, "factor", 1)
    for phase in ("start", "save", "validation", "end"):
        assert hang_limit(config(pause=7.0), phase, [1.0] * 50) == HangLimit(7, "pause")
    assert (heartbeat_period(config()), heartbeat_period(config(at_least=2.0))) == (5.0, 0.5)
    assert heartbeat_period(config(at_least=2.0, factor=0.0)) == 5.0


def test_a_huge_limit_does_not_overflow_the_timer(tmp_path: Path) -> None:
    """With the longest limit of a configuration, the heartbeat's thread can set the timer."""
    clear_ranks(tmp_path)
    clear_alarm(tmp_path)
    heartbeat = Heartbeat(tmp_path, 0, 1, print)
    with Watchdog(heartbeat, config(pause=1e7), tmp_path, 1, print):
        heartbeat.on_tick()


def test_reading_with_all_retries_is_within_the_limit() -> None:
    data = DataConfig()  # type: ignore[call-arg]
    assert config().at_least > data.timeout * (data.retries + 1)


def test_report_of_a_hang(tmp_path: Path) -> None:
    now = RankPosition(120, "step", 0.0)

    def line(position: RankPosition, limit: HangLimit) -> str:
        hung = make_beats({"hung": True}, {"work": "data", "turns": 1, "hung": True})
        return describe_hang(position, 312.0, limit, hung, 2, 15, tmp_path)

    end = f"rank 1 (n1) is still reading data; stacks in {tmp_path}; the job is to be started again"
    assert line(now, HangLimit(310, "factor", 31)) == (
        f"step 120 takes 312 s, 10.1 x the usual 31 s: {end}"
    )
    assert line(RankPosition(1, "step", 0.0), HangLimit(312, "first")) == (
        f"step 1 takes 312 s, the limit is watchdog.first 312: {end}"
    )
    assert line(RankPosition(120, "save", 0.0), HangLimit(300, "pause")).startswith(
        "the save after step 120 takes 312 s, the limit is watchdog.pause 300: "
    )
    assert line(RankPosition(0, "start", 0.0), HangLimit(300, "pause")).startswith(
        "the start takes 312 s, "
    )


class Ranks:
    """Heartbeats and watchdogs of several ranks in one process; exits are only recorded."""

    def __init__(self, run: Path, count: int, **keys: Any) -> None:
        clear_ranks(run)
        clear_alarm(run)
        self.run, self.reports, self.codes = run, [], {}  # type: ignore[var-annotated]
        self.settings = config(at_least=0.5, factor=2.0, first=30.0, **keys)
        self.heartbeats = [Heartbeat(run, r, count, print, period=0.1) for r in range(count)]
        self.watchdogs = [
            Watchdog(
                heartbeat,
                self.settings,
                run,
                count,
                lambda line, rank=rank: self.reports.append((rank, line)),  # type: ignore[misc]
                terminate=lambda code, rank=rank: self.codes.update({rank: code}),  # type: ignore[misc]
            )
            for rank, heartbeat in enumerate(self.heartbeats)
        ]

    def __enter__(self) -> Ranks:
        for part in (*self.heartbeats, *self.watchdogs):
            part.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for part in (*self.watchdogs, *self.heartbeats):
            part.__exit__()

    def step(self, number: int, arrives: bool = True, rank: int | None = None) -> None:
        for heartbeat in self.heartbeats if rank is None else [self.heartbeats[rank]]:
            heartbeat.enter("step", number)
            heartbeat.begin("data")
            if arrives:
                heartbeat.end()

    def wait_until_terminated(self) -> None:
        for _ in range(3000):
            if len(self.codes) == len(self.watchdogs):
                return
            time.sleep(0.01)
        raise AssertionError(f"only {self.codes} terminated")


def test_a_stalled_rank_ends_all_ranks(tmp_path: Path) -> None:
    with Ranks(tmp_path, 3) as ranks:
        for number in range(1, 5):
            ranks.step(number)
        ranks.step(5)
        ranks.step(5, arrives=False, rank=2)
        ranks.wait_until_terminated()
    assert ranks.codes == {0: 76, 1: 76, 2: 76}
    ((reporter, line),) = ranks.reports
    assert reporter == 0 and "step 5 takes " in line and "rank 2 (" in line
    assert "is still reading data; stacks in " in line
    for rank in range(3):
        stacks = (tmp_path / "stacks" / "step-5" / f"rank-{rank:05}.txt").read_text()
        assert "wait_until_terminated" in stacks and "Thread 0x" in stacks
    (record,) = map(json.loads, (tmp_path / "watchdog.jsonl").read_text().splitlines())
    assert (record["step"], record["line"]) == (5, line)
    assert all(beat.hung and beat.ended for beat in read_heartbeats(tmp_path).values())


def test_the_alarm_of_one_rank_ends_ranks_within_their_limits(tmp_path: Path) -> None:
    with Ranks(tmp_path, 2) as ranks:
        ranks.step(1, rank=0)
        for number in range(1, 6):
            ranks.step(number, rank=1)  # with durations, its limit is short
        ranks.wait_until_terminated()
    assert ranks.codes == {0: 76, 1: 76} and len(ranks.reports) == 1
    assert "rank 0 (" in ranks.reports[0][1]


def test_steps_within_the_limit_and_factor_0_raise_no_alarm(tmp_path: Path) -> None:
    with Ranks(tmp_path / "on", 1) as ranks:
        for number in range(1, 100):
            ranks.step(number)
            time.sleep(0.01)
        ranks.heartbeats[0].enter("save", 99)  # a phase with a longer limit
        time.sleep(1.2)
    assert not ranks.codes and not ranks.reports
    assert not (tmp_path / "on" / "stacks").exists()
    assert not list((tmp_path / "on" / "ranks").glob("*.stacks"))
    heartbeat = Heartbeat(tmp_path / "off", 0, 1, print)
    before = threading.active_count()
    with Watchdog(heartbeat, config(factor=0.0), tmp_path / "off", 1, print):
        assert threading.active_count() == before


def test_no_timer_is_set_after_the_stacks_file_is_closed(tmp_path: Path) -> None:
    """The heartbeat's thread may be about to set the timer while the watchdog exits."""
    heartbeat = Heartbeat(tmp_path, 0, 1, print)
    (tmp_path / "ranks").mkdir()
    clear_alarm(tmp_path)
    with Watchdog(heartbeat, config(), tmp_path, 1, print) as watchdog:
        on_tick = heartbeat.on_tick
    with mock.patch("faulthandler.dump_traceback_later") as set_timer:
        on_tick()
    assert not set_timer.called and not watchdog._stacks.exists()


def test_a_hang_is_reported_without_a_disk(tmp_path: Path) -> None:
    (tmp_path / "ranks").write_text("a file")
    with Ranks(tmp_path, 1) as ranks:
        for number in range(1, 6):
            ranks.step(number)
        ranks.wait_until_terminated()
    assert ranks.codes == {0: 76} and "step 5 takes " in ranks.reports[0][1]
