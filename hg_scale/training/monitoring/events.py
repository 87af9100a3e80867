"""Tells a command or a webhook that a run ended, gave up, met a bad step or hangs.

`logging.on_event` names it. It runs in a process of its own (`event_process.py`) that may outlive
the run, so it can neither delay nor end it; what goes wrong is one warning. Imports no torch.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import hg_scale
from hg_scale.exit_codes import GAVE_UP, meaning
from hg_scale.run_starts import job_id

RunEventKind = Literal["end", "give_up", "bad_step", "stall"]
Target = str | list[str]

EVENT_TIMEOUT = 30.0  # seconds that the command or the server may take
BATCH_SENDS = "HG_EVENTS"  # set by slurm/common.sh, which sends `end` and `give_up` itself
END_WAIT = 10.0  # seconds that an exit waits for it: Slurm ends what a step leaves behind


class EventSender:
    """Sends the events of a run; without a target it does nothing.

    warn: called with one line if the process that sends cannot be started. stderr: file descriptor
    to which that process writes its warning; None: this process's own.
    """

    def __init__(
        self,
        target: Target | None,
        run: Path,
        steps: int,
        warn: Callable[[str], None] = print,
        stderr: int | None = None,
    ) -> None:
        self.target, self._run, self._steps = target, run, steps
        self._warn, self._stderr = warn, stderr
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sent: set[RunEventKind] = set()

    def send(
        self, kind: RunEventKind, reason: str, step: int | None = None, code: int | None = None
    ) -> None:
        """Send an event and return at once; each kind once per start."""
        if not self.target or kind in self._sent:
            return
        self._sent.add(kind)
        message = {
            "event": kind,
            "run": str(self._run.resolve()),
            "step": step,
            "steps": self._steps,
            "exit_code": code,
            "reason": reason,
            "job": job_id(os.environ),
            "host": socket.gethostname(),
            "time": round(time.time(), 3),
        }
        try:
            self._processes.append(start_sending(self.target, message, self._stderr))
        except OSError as error:
            self._warn(f"logging.on_event: the event {kind} was not sent: {error.strerror}")

    def send_end(self, code: int, reason: str, step: int | None = None) -> None:
        """Send the end of this start, and wait for all events, END_WAIT seconds at most."""
        self._stderr = None  # the terminal's stream may be closed
        kind: RunEventKind = "give_up" if code == GAVE_UP else "end"
        self.send(kind, reason or meaning(code), step, code)
        self.wait()

    def wait(self, seconds: float = END_WAIT) -> None:
        """Wait until the events are sent, `seconds` at most."""
        end = time.monotonic() + seconds
        for process in self._processes:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                return


def start_sending(
    target: Target, message: dict[str, Any], stderr: int | None = None
) -> subprocess.Popen[bytes]:
    """Start the process that sends a message; the target, which may hold a secret, goes by stdin.

    Raises OSError.
    """
    root = str(Path(hg_scale.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", "hg_scale.training.monitoring.event_process"],
        stdin=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"},
        start_new_session=True,  # a signal to the run's process group is not for it
    )
    assert process.stdin is not None
    with process.stdin:
        process.stdin.write(json.dumps({"target": target, "message": message}).encode())
    return process
