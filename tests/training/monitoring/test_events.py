"""Events of a run for a command or a webhook: real processes and a real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from hg_scale.config.load import parse_config
from hg_scale.training.monitoring import event_process, events
from hg_scale.training.monitoring.event_process import deliver
from hg_scale.training.monitoring.events import EventSender, Target
from tests.runs import TINY
from tests.shared import ROOT

MESSAGE = {"event": "end", "reason": "done"}
SECRET = "hooks-4711-secret"


@pytest.fixture(scope="module")
def server() -> Iterator[HTTPServer]:
    """A server that keeps the bodies posted to it in `received`; /500 fails, /slow hangs."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.startswith("/slow"):
                time.sleep(1)
            server.received.append((self.path, json.loads(body)))  # type: ignore[attr-defined]
            self.send_response(500 if self.path.startswith("/500") else 204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.received = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_webhook_gets_the_message(server: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HG_TEST_HOOK", f"{url}/{SECRET}")
    assert deliver("$HG_TEST_HOOK", MESSAGE) is None
    assert server.received[-1] == (f"/{SECRET}", MESSAGE)  # type: ignore[attr-defined]
    problem = deliver(f"{url}/500/{SECRET}", MESSAGE)
    assert problem == "the webhook of 127.0.0.1 failed: HTTP status 500"
    problem = deliver(f"{url}/slow/{SECRET}", MESSAGE, timeout=0.1)
    assert problem and SECRET not in problem and "TimeoutError" in problem


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/", "https://[/", "http://a b/", "http:///"])
def test_a_webhook_that_is_not_there_is_one_line_without_its_secret(url: str) -> None:
    problem = deliver(url + SECRET, MESSAGE, timeout=5)
    assert problem and "\n" not in problem and SECRET not in problem


def test_a_command_reads_the_message(tmp_path: Path) -> None:
    file = tmp_path / "got file"
    assert deliver(["/bin/sh", "-c", 'cat > "$0"', str(file)], MESSAGE) is None
    assert json.loads(file.read_text()) == MESSAGE
    file.unlink()
    assert deliver(f"cat > '{file}'", MESSAGE) is None
    assert json.loads(file.read_text()) == MESSAGE
    assert deliver("true", {"reason": "x" * 1_000_000}) is None  # it reads no input


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        (["/bin/sh", "-c", "exit 3", SECRET], "/bin/sh ended with exit code 3"),
        (f"exit 4 # {SECRET}", "the command ended with exit code 4"),
        (["no-such-command", SECRET], "no-such-command cannot be run: No such file or directory"),
        (["a\0b", SECRET], "a\0b cannot be run: ValueError"),
        (f"sleep 60; : {SECRET}", "the command took more than 0.2 s and was ended"),
    ],
)
def test_a_command_that_fails_is_one_line(target: Target, problem: str) -> None:
    start = time.monotonic()
    assert deliver(target, MESSAGE, timeout=0.2 if "sleep" in str(target) else 30) == problem
    assert time.monotonic() - start < 20


def test_a_sender_neither_waits_nor_fails(tmp_path: Path) -> None:
    output = tmp_path / "events"
    warnings: list[str] = []
    with (tmp_path / "stderr").open("w") as stderr:
        sender = EventSender(
            f"cat >> {output}; echo >> {output}", tmp_path, 9, warnings.append, stderr.fileno()
        )
        start = time.monotonic()
        for step in (3, 4):  # the second of a kind is not sent
            sender.send("bad_step", "the loss is not finite", step)
        assert time.monotonic() - start < 2
        sender.wait(60)
        sender.send_end(77, "gave up after step 9", 9)
        sender.wait(60)
    first, last = map(json.loads, output.read_text().splitlines())
    assert first.pop("time") > 1e9 and first.pop("host")
    assert first == {
        "event": "bad_step", "run": str(tmp_path), "step": 3, "steps": 9, "exit_code": None,
        "reason": "the loss is not finite", "job": events.job_id(os.environ),
    }  # fmt: skip
    assert (last["event"], last["exit_code"], last["step"]) == ("give_up", 77, 9)
    assert not warnings and not (tmp_path / "stderr").read_text()
    page = (ROOT / "docs/watching.md").read_text()
    assert not [key for key in last if f"| `{key}` |" not in page]


def test_an_event_that_fails_is_one_warning(tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w") as stderr:
        sender = EventSender(["false", SECRET], tmp_path, 9, stderr=stderr.fileno())
        sender.send("stall", "step 3 takes 900 s")
        sender.wait(60)
    assert (tmp_path / "stderr").read_text() == (
        "warning: logging.on_event, stall: false ended with exit code 1\n"
    )


def test_without_python_the_event_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "gone"))
    warnings: list[str] = []
    sender = EventSender("true", tmp_path, 9, warnings.append)
    sender.send("stall", "")
    assert warnings == ["logging.on_event: the event stall was not sent: No such file or directory"]


def test_the_batch_script_sends_an_event_of_a_run(tmp_path: Path) -> None:
    output = tmp_path / "events"
    tree = {**TINY, "logging": {"on_event": f"cat > {output}"}, "data": {"path": "nowhere"}}
    (tmp_path / "c.json").write_text(json.dumps(tree))
    command = [sys.executable, "-m", event_process.__name__, "--event", "0", "done"]
    command += ["--config", str(tmp_path / "c.json"), "--run", str(tmp_path / "run"), "--stop-at"]
    command += ["4", "--set", "training.steps=7"]
    environment = {**os.environ, "SLURM_JOB_ID": "7"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    event = json.loads(output.read_text())
    assert (event["event"], event["exit_code"], event["steps"]) == ("end", 0, 7)
    assert event["job"] == "7"


def test_the_target_is_in_no_file() -> None:
    config = parse_config({**TINY, "logging": {"on_event": f"https://example.org/{SECRET}"}})
    assert config.logging.on_event and SECRET in config.logging.on_event
    assert SECRET not in config.model_dump_json() and SECRET not in str(config.model_dump())
