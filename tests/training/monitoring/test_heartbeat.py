"""What a rank writes to its heartbeat file, and what others read."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from hg_scale.training.monitoring.heartbeat import Heartbeat, clear_ranks, read_heartbeats
from tests.training.monitoring.heartbeats import make_beats, write_beats


def test_position_of_a_rank_is_written(tmp_path: Path) -> None:
    clear_ranks(tmp_path)
    heartbeat = Heartbeat(tmp_path, 3, 8, print)
    heartbeat.beat()
    beat = read_heartbeats(tmp_path)[3]
    assert (beat.rank, beat.world_size, beat.pid) == (3, 8, os.getpid())
    assert beat.host == socket.gethostname()
    assert (beat.step, beat.phase, beat.step_seconds, beat.activity) == (
        0,
        "start",
        None,
        "starting",
    )

    heartbeat.enter("step", 7)
    heartbeat.begin("data")
    heartbeat.beat()
    beat = read_heartbeats(tmp_path)[3]
    assert (beat.step, beat.phase, beat.work, beat.turns) == (7, "step", "data", 1)
    assert beat.activity == "reading data for step 7"
    heartbeat.end()
    heartbeat.begin("forward")
    heartbeat.beat()
    assert read_heartbeats(tmp_path)[3].activity == "in the forward pass of step 7"
    heartbeat.end()
    assert heartbeat.position[3:] == ("", 4)

    heartbeat.enter("save", 7)
    heartbeat.enter("validation", 7)
    heartbeat.beat()
    beat = read_heartbeats(tmp_path)[3]
    assert (beat.activity, beat.turns) == ("validating after step 7", 0)
    assert list(heartbeat.durations) == [beat.step_seconds]  # without the save
    heartbeat.enter("end", 7)
    assert len(heartbeat.durations) == 1


def test_the_thread_writes_periodically_and_at_the_end(tmp_path: Path) -> None:
    clear_ranks(tmp_path)
    with Heartbeat(tmp_path, 0, 1, print, period=0.02) as heartbeat:
        while not read_heartbeats(tmp_path):
            time.sleep(0.01)
        heartbeat.enter("step", 1)
        heartbeat.table = {"step": 1, "ranks": []}
        while read_heartbeats(tmp_path)[0].step < 1:
            time.sleep(0.01)
        assert not read_heartbeats(tmp_path)[0].ended
    assert read_heartbeats(tmp_path)[0].ended
    table = json.loads((tmp_path / "ranks" / "stragglers.json").read_text())
    assert table == {"step": 1, "ranks": []}
    assert not list((tmp_path / "ranks").glob(".*"))


def test_an_unwritable_folder_is_warned_of_once(tmp_path: Path) -> None:
    (tmp_path / "ranks").write_text("a file where the folder should be")
    warnings: list[str] = []
    clear_ranks(tmp_path)
    heartbeat = Heartbeat(tmp_path, 0, 1, warnings.append)
    heartbeat.beat()
    heartbeat.beat()
    assert warnings == [f"{tmp_path / 'ranks'}: cannot write the heartbeat: Not a directory"]


def test_earlier_heartbeats_are_cleared_and_unreadable_ones_skipped(tmp_path: Path) -> None:
    write_beats(tmp_path, make_beats({}, {}, {}))
    folder = tmp_path / "ranks"
    (folder / "rank-00001.json").write_text('{"rank": 1')
    (folder / "rank-00002.json").write_text("[]")
    values = json.loads((folder / "rank-00000.json").read_text())
    (folder / "rank-00000.json").write_text(json.dumps({**values, "key_of_a_later_version": 1}))
    assert list(read_heartbeats(tmp_path)) == [0]
    (folder / "rank-00002.end").write_text("")
    clear_ranks(tmp_path)
    assert not list(folder.iterdir())
