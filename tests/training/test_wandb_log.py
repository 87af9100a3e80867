"""The real wandb, offline or with a server that does not answer."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from wandb.sdk import wandb_setup

from hg_scale.training import wandb_process
from hg_scale.training.wandb_log import WandbLog, choose_mode, run_id

KEY = "0" * 40
CHILD = """
import os, sys
from pathlib import Path
from hg_scale.training.wandb_log import WandbLog
earlier = len(list(Path(sys.argv[1]).glob("wandb/*-run-*/*.wandb")))
log = WandbLog(Path(sys.argv[1]), "hg", config={"model": {"d_model": 8}}, warn=print,
               init_timeout=3, finish_timeout=5)
for step in range(1, 4):
    log.log({"step": step, "loss": 1 / step})
if "lost" in sys.argv:
    while len(list(Path(sys.argv[1]).glob("wandb/*-run-*/*.wandb"))) == earlier: pass
    os._exit(0)
log.finish()
"""


def run(run_dir: Path, *arguments: str, **environment: str) -> str:
    """Log three steps to wandb in a process; return its stdout."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(run_dir), *arguments],
        env={**clean, "NETRC": str(run_dir / "no-netrc"), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_key_runs_are_offline_and_a_restart_keeps_the_id(tmp_path):
    """The second start ends by os._exit, as after a lost rank."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    for arguments in ((), ("lost",)):
        assert run(tmp_path, *arguments, TMPDIR=str(temporary)) == ""
    end = time.monotonic() + 60
    while list(temporary.iterdir()) and time.monotonic() < end:
        time.sleep(0.1)  # wandb's process outlives the run
    assert list(temporary.iterdir()) == []
    name = (tmp_path / "wandb_id").read_text().strip()
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert files and all(b"loss" in file.read_bytes() for file in files)
    assert {file.name for file in (tmp_path / "wandb").rglob("*.wandb")} == {f"run-{name}.wandb"}


def test_an_unresponsive_server_is_one_warning_and_does_not_end_the_run(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # accepts, and never answers
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        start = time.monotonic()
        printed = run(tmp_path, WANDB_API_KEY="0" * 40, WANDB_BASE_URL=url)
    assert len(printed.splitlines()) == 1 and printed.startswith("wandb ")
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("raise SystemError('two\\nlines')", "wandb disabled: two lines\n"),
        ("import os; os._exit(9)", "wandb disabled: its process ended with exit code 9\n"),
    ],
)
def test_a_broken_wandb_is_one_warning(tmp_path, broken, message):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(broken + "\n")
    (temporary := tmp_path / "temporary").mkdir()
    assert run(tmp_path, PYTHONPATH=str(tmp_path), TMPDIR=str(temporary)) == message
    assert list(temporary.iterdir()) == []


def test_an_unreadable_netrc_or_setting_is_at_most_one_warning(tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_bytes(b"machine example.org login x password caf\xe9\n")
    printed = run(tmp_path, NETRC=str(netrc), PYTHONUTF8="1", WANDB_MODE="of")
    assert printed.startswith("wandb disabled: ") and len(printed.splitlines()) == 1
    assert "'of'" in printed


def test_disabled_does_nothing(tmp_path):
    log = WandbLog(tmp_path, "hg", mode="disabled")
    log.log({"step": 1})
    log.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """An environment without settings or keys of wandb, which keeps them for a process."""
    for key in [key for key in os.environ if key.startswith("WANDB_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("WANDB_MODE", "")  # choose_mode changes it; restored afterwards
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb_setup, "_singleton", None)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": KEY}, "online"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": " Offline"}, "offline"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_API_KEY": KEY, "WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_API_KEY": KEY, "WANDB_DISABLED": "false"}, "online"),
        ({"WANDB_MODE": "online"}, "online"),
    ],
)
def test_the_mode_depends_on_the_environment(environment, variables, mode):
    for name, value in variables.items():
        environment.setenv(name, value)
    assert choose_mode() == mode


def test_a_settings_file_of_wandb_counts(environment, tmp_path):
    """As `wandb offline` writes it."""
    environment.setenv("WANDB_API_KEY", KEY)
    settings = tmp_path / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nmode = offline\n")
    assert choose_mode() == "offline"


@pytest.mark.parametrize(
    ("url", "mode"),
    [("https://api.wandb.ai", "online"), ("https://wandb.example.org:8443", "offline")],
)
def test_a_key_in_netrc_counts_for_its_server_only(environment, tmp_path, url, mode):
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    environment.setenv("WANDB_BASE_URL", url)
    assert choose_mode() == mode


def test_lines_end_with_the_parent_even_if_the_pipe_stays_open(monkeypatch):
    reader, writer = os.pipe()
    monkeypatch.setattr(wandb_process.os, "read", lambda _, size, read=os.read: read(reader, size))
    monkeypatch.setattr(
        wandb_process.select,
        "select",
        lambda *_, select=select.select: select([reader], [], [], 0),
    )
    os.write(writer, b"one\ntwo\nhalf")
    assert list(wandb_process.lines_of_parent(parent=-1)) == [b"one", b"two"]
    os.close(reader)
    os.close(writer)


def test_the_run_id_is_created_once(tmp_path):
    first = run_id(tmp_path / "run")
    assert first == run_id(tmp_path / "run") and len(first) == 8
    assert first != run_id(tmp_path / "other")
