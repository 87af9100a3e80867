"""When a rank is ended, and what it leaves behind. Real runs that hang: tests/faults."""

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
    Limit,
    Watchdog,
    clear_alarm,
    describe_hang,
    limit_of,
    period_of,
)
from tests.training.monitoring.heartbeats import make_beats


def config(**keys: Any) -> WatchdogConfig:
    return WatchdogConfig(**keys)


def test_limits() -> None:
    assert limit_of(config(), "step", [9.0, 31.0]) == Limit(1800, "first")
    assert limit_of(config(first=5.0), "step", []) == Limit(300, "first")
    assert limit_of(config(), "step", [600.0, 31.0, 31.0]) == Limit(310, "factor", 31)
    assert limit_of(config(), "step", [1.0] * 50) == Limit(300, "factor", 1)
    for phase in ("start", "save", "validation", "end"):
        assert limit_of(config(pause=7.0), phase, [1.0] * 50) == Limit(7, "pause")
    assert (period_of(config()), period_of(config(at_least=2.0))) == (5.0, 0.5)
    assert period_of(config(at_least=2.0, factor=0.0)) == 5.0


def test_the_longest_limit_is_no_trouble_to_timers(tmp_path: Path) -> None:
    """The longest that may be written: the heartbeat's thread, which sets the timer, lives on."""
    clear_ranks(tmp_path)
    clear_alarm(tmp_path)
    heart = Heartbeat(tmp_path, 0, 1, print)
    with Watchdog(heart, config(pause=1e7), tmp_path, 1, print):
        heart.each_tick()


def test_reading_with_all_retries_is_no_hang() -> None:
    data = DataConfig()  # type: ignore[call-arg]
    assert config().at_least > data.timeout * (data.retries + 1)


def test_the_line(tmp_path: Path) -> None:
    now = RankPosition(120, "step", 0.0)

    def line(place: RankPosition, limit: Limit) -> str:
        hung = make_beats({"hung": True}, {"work": "data", "turns": 1, "hung": True})
        return describe_hang(place, 312.0, limit, hung, 2, 15, tmp_path)

    end = f"rank 1 (n1) is still reading data; stacks in {tmp_path}; the job is to be started again"
    assert line(now, Limit(310, "factor", 31)) == (
        f"step 120 takes 312 s, 10.1 x the usual 31 s: {end}"
    )
    assert line(RankPosition(1, "step", 0.0), Limit(312, "first")) == (
        f"step 1 takes 312 s, the limit is watchdog.first 312: {end}"
    )
    assert line(RankPosition(120, "save", 0.0), Limit(300, "pause")).startswith(
        "the save after step 120 takes 312 s, the limit is watchdog.pause 300: "
    )
    assert line(RankPosition(0, "start", 0.0), Limit(300, "pause")).startswith(
        "the start takes 312 s, "
    )


class Ranks:
    """Hearts and watchdogs of several ranks in one process, that note an end instead of ending."""

    def __init__(self, run: Path, count: int, **keys: Any) -> None:
        clear_ranks(run)
        clear_alarm(run)
        self.run, self.said, self.codes = run, [], {}  # type: ignore[var-annotated]
        self.settings = config(at_least=0.5, factor=2.0, first=30.0, **keys)
        self.hearts = [Heartbeat(run, r, count, print, period=0.1) for r in range(count)]
        self.dogs = [
            Watchdog(
                heart,
                self.settings,
                run,
                count,
                lambda line, rank=rank: self.said.append((rank, line)),  # type: ignore[misc]
                leave=lambda code, rank=rank: self.codes.update({rank: code}),  # type: ignore[misc]
            )
            for rank, heart in enumerate(self.hearts)
        ]

    def __enter__(self) -> Ranks:
        for part in (*self.hearts, *self.dogs):
            part.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for part in (*self.dogs, *self.hearts):
            part.__exit__()

    def step(self, number: int, arrives: bool = True, rank: int | None = None) -> None:
        for heart in self.hearts if rank is None else [self.hearts[rank]]:
            heart.enter("step", number)
            heart.begin("data")
            if arrives:
                heart.end()

    def wait_for_the_end(self) -> None:
        for _ in range(3000):
            if len(self.codes) == len(self.dogs):
                return
            time.sleep(0.01)
        raise AssertionError(f"only {self.codes} ended")


def test_a_rank_that_does_not_arrive_ends_all(tmp_path: Path) -> None:
    with Ranks(tmp_path, 3) as ranks:
        for number in range(1, 5):
            ranks.step(number)
        ranks.step(5)
        ranks.step(5, arrives=False, rank=2)
        ranks.wait_for_the_end()
    assert ranks.codes == {0: 76, 1: 76, 2: 76}
    ((speaker, line),) = ranks.said
    assert speaker == 0 and "step 5 takes " in line and "rank 2 (" in line
    assert "is still reading data; stacks in " in line
    for rank in range(3):
        stacks = (tmp_path / "stacks" / "step-5" / f"rank-{rank:05}.txt").read_text()
        assert "wait_for_the_end" in stacks and "Thread 0x" in stacks
    (record,) = map(json.loads, (tmp_path / "watchdog.jsonl").read_text().splitlines())
    assert (record["step"], record["line"]) == (5, line)
    assert all(beat.hung and beat.ended for beat in read_heartbeats(tmp_path).values())


def test_one_rank_s_alarm_reaches_those_within_their_limits(tmp_path: Path) -> None:
    with Ranks(tmp_path, 2) as ranks:
        ranks.step(1, rank=0)
        for number in range(1, 6):
            ranks.step(number, rank=1)  # whose limit is short, since it knows steps
        ranks.wait_for_the_end()
    assert ranks.codes == {0: 76, 1: 76} and len(ranks.said) == 1
    assert "rank 0 (" in ranks.said[0][1]


def test_steps_that_go_on_end_nothing_nor_does_factor_0(tmp_path: Path) -> None:
    with Ranks(tmp_path / "on", 1) as ranks:
        for number in range(1, 100):
            ranks.step(number)
            time.sleep(0.01)
        ranks.hearts[0].enter("save", 99)  # a pause has a limit of its own
        time.sleep(1.2)
    assert not ranks.codes and not ranks.said
    assert not (tmp_path / "on" / "stacks").exists()
    assert not list((tmp_path / "on" / "ranks").glob("*.stacks"))
    heart = Heartbeat(tmp_path / "off", 0, 1, print)
    before = threading.active_count()
    with Watchdog(heart, config(factor=0.0), tmp_path / "off", 1, print):
        assert threading.active_count() == before


def test_nothing_is_left_to_write_stacks_into_a_file_that_is_closed(tmp_path: Path) -> None:
    """The heartbeat's thread may be about to set that while the watchdog leaves."""
    heart = Heartbeat(tmp_path, 0, 1, print)
    (tmp_path / "ranks").mkdir()
    clear_alarm(tmp_path)
    with Watchdog(heart, config(), tmp_path, 1, print) as dog:
        late = heart.each_tick
    with mock.patch("faulthandler.dump_traceback_later") as armed:
        late()
    assert not armed.called and not dog._stacks.exists()


def test_an_alarm_without_a_disk(tmp_path: Path) -> None:
    (tmp_path / "ranks").write_text("no folder")
    with Ranks(tmp_path, 1) as ranks:
        for number in range(1, 6):
            ranks.step(number)
        ranks.wait_for_the_end()
    assert ranks.codes == {0: 76} and "step 5 takes " in ranks.said[0][1]
