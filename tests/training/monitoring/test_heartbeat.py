"""What a rank writes down of itself, and what others read."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from hg_scale.training.monitoring.heartbeat import Heartbeat, clear_ranks, read_heartbeats
from tests.training.monitoring.heartbeats import make_beats, write_beats


def test_where_a_rank_stands(tmp_path: Path) -> None:
    clear_ranks(tmp_path)
    heart = Heartbeat(tmp_path, 3, 8, print)
    heart.beat()
    beat = read_heartbeats(tmp_path)[3]
    assert (beat.rank, beat.world_size, beat.pid) == (3, 8, os.getpid())
    assert beat.host == socket.gethostname()
    assert (beat.step, beat.phase, beat.step_seconds, beat.doing) == (0, "start", None, "starting")

    heart.enter("step", 7)
    heart.begin("data")
    heart.beat()
    beat = read_heartbeats(tmp_path)[3]
    assert (beat.step, beat.phase, beat.work, beat.turns) == (7, "step", "data", 1)
    assert beat.doing == "reading data for step 7"
    heart.end()
    heart.begin("forward")
    heart.beat()
    assert read_heartbeats(tmp_path)[3].doing == "in the forward pass of step 7"
    heart.end()
    assert heart.place[3:] == ("", 4)

    heart.enter("save", 7)
    heart.enter("validation", 7)
    heart.beat()
    beat = read_heartbeats(tmp_path)[3]
    assert (beat.doing, beat.turns) == ("validating after step 7", 0)
    assert list(heart.durations) == [beat.step_seconds]  # the save is no step
    heart.enter("end", 7)
    assert len(heart.durations) == 1


def test_a_thread_writes_by_itself_and_the_end(tmp_path: Path) -> None:
    clear_ranks(tmp_path)
    with Heartbeat(tmp_path, 0, 1, print, period=0.02) as heart:
        while not read_heartbeats(tmp_path):
            time.sleep(0.01)
        heart.enter("step", 1)
        heart.table = {"step": 1, "ranks": []}
        while read_heartbeats(tmp_path)[0].step < 1:
            time.sleep(0.01)
        assert not read_heartbeats(tmp_path)[0].ended
    assert read_heartbeats(tmp_path)[0].ended
    table = json.loads((tmp_path / "ranks" / "stragglers.json").read_text())
    assert table == {"step": 1, "ranks": []}
    assert not list((tmp_path / "ranks").glob(".*"))


def test_a_disk_that_cannot_be_written_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "ranks").write_text("a file where the folder should be")
    told: list[str] = []
    clear_ranks(tmp_path)
    heart = Heartbeat(tmp_path, 0, 1, told.append)
    heart.beat()
    heart.beat()
    assert told == [f"{tmp_path / 'ranks'}: no heartbeat can be written: Not a directory"]


def test_earlier_ranks_are_cleared_and_broken_files_passed_over(tmp_path: Path) -> None:
    write_beats(tmp_path, make_beats({}, {}, {}))
    folder = tmp_path / "ranks"
    (folder / "rank-00001.json").write_text('{"rank": 1')
    (folder / "rank-00002.json").write_text("[]")
    values = json.loads((folder / "rank-00000.json").read_text())
    (folder / "rank-00000.json").write_text(json.dumps({**values, "of a later version": 1}))
    assert list(read_heartbeats(tmp_path)) == [0]
    (folder / "rank-00002.end").write_text("")
    clear_ranks(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["rank-00002.end"]  # that rank's to clear
