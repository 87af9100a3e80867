"""The real wandb, offline or with a server that does not answer."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hg_scale.training.wandb_log import WandbLog, choose_mode, run_id

CHILD = """
import sys
from pathlib import Path
from hg_scale.training.wandb_log import WandbLog
log = WandbLog(Path(sys.argv[1]), "hg", config={"model": {"d_model": 8}}, warn=print,
               init_timeout=3, finish_timeout=5)
for step in range(1, 4):
    log.log({"step": step, "loss": 1 / step})
log.finish()
"""


def run(run_dir: Path, **environment: str) -> str:
    """Log three steps to wandb in a process; return its stdout."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(run_dir)],
        env={**clean, "NETRC": str(run_dir / "no-netrc"), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_key_runs_are_offline_and_a_restart_keeps_the_id(tmp_path):
    for _ in range(2):
        assert run(tmp_path) == ""
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


def test_a_broken_wandb_is_one_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # its import fails
    warnings: list[str] = []
    log = WandbLog(tmp_path, "hg", mode="offline", warn=warnings.append)
    log._thread.join(10)
    log.log({"step": 1})
    log.finish()
    assert len(warnings) == 1 and warnings[0].startswith("wandb disabled: ")


def test_disabled_does_nothing(tmp_path):
    log = WandbLog(tmp_path, "hg", mode="disabled")
    log.log({"step": 1})
    log.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """An environment without settings or keys of wandb."""
    for key in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return monkeypatch


def test_the_mode_depends_on_the_environment(environment):
    assert choose_mode() == "offline"
    environment.setenv("WANDB_API_KEY", "k")
    assert choose_mode() == "online"
    environment.setenv("WANDB_MODE", "disabled")
    assert choose_mode() == "disabled"


def test_a_key_in_netrc_counts_for_its_server_only(environment, tmp_path):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40 + "\n")
    assert choose_mode() == "online"
    environment.setenv("WANDB_BASE_URL", "https://wandb.example.org:8443")
    assert choose_mode() == "offline"
    (tmp_path / "netrc").write_text("not a netrc")
    assert choose_mode() == "offline"


def test_the_run_id_is_created_once(tmp_path):
    first = run_id(tmp_path / "run")
    assert first == run_id(tmp_path / "run") and len(first) == 8
    assert first != run_id(tmp_path / "other")
