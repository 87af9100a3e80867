"""A run folder has one run at a time, and a killed run does not block it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hg_scale import folder_lock
from hg_scale.checkpoint.find import find_latest, verify_sizes
from hg_scale.errors import UserError
from hg_scale.training.run_lock import RunLock
from tests.runs import train_in
from tests.world import Worlds

HOLDER = (
    "import sys; from pathlib import Path; from hg_scale.training.run_lock import RunLock\n"
    "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
)


def test_a_second_run_is_refused(worlds: Worlds, config: Path, tmp_path: Path) -> None:
    """All ranks end, one line is printed, and the files of the first run are not touched."""
    run = tmp_path / "run"
    arguments = ["--config", str(config), "--run", str(run), "--set", "checkpoint.every=2"]
    assert train_in(worlds, 1, tmp_path, *arguments, "--stop-at", "2").code == 0
    half = run / "checkpoints" / ".step-00000004.tmp"
    half.mkdir()
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as first:
        try:
            assert first.stdout and first.stdout.readline() == "held\n"
            done = train_in(worlds, 2, tmp_path, *arguments)
            assert done.code == 1
            (line,) = done.output.splitlines()
            where = f"{run}: process {first.pid} on {socket.gethostname()}, since "
            assert line.startswith(where)
            assert line.endswith("is training there; end it, or choose another --run")
            assert half.is_dir()
            assert not list((run / "ranks").glob("*.end"))  # it would end the first run, too
        finally:
            os.kill(first.pid, signal.SIGKILL)
    assert (run / "owner.json").exists()
    assert train_in(worlds, 2, tmp_path, *arguments).code == 0
    newest = find_latest(run / "checkpoints")
    assert newest and newest.name == "step-00000006" and verify_sizes(newest) is None
    assert not (run / "owner.json").exists()


def test_a_dead_run_on_another_host_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "_WATCH", 0.3)
    monkeypatch.setattr(folder_lock, "BEAT", 0.1)
    owner = {"host": "n7", "kernel": "other", "pid": 1, "nonce": "n", "since": "noon", "beat": 4}
    (tmp_path / "owner.json").write_text(json.dumps(owner))
    with RunLock(tmp_path) as lock:
        lock.require()
        (tmp_path / "owner.json").write_text(json.dumps(owner))
        with pytest.raises(UserError, match=r"process 1 on n7, since noon, is training there"):
            lock.require()  # the other run took this one for dead and has taken over
    assert json.loads((tmp_path / "owner.json").read_text()) == owner  # not ours to remove


def test_an_unwritable_folder_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        RunLock(tmp_path / "missing")
