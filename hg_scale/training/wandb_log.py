"""Logging to Weights & Biases that can neither stop nor slow a run.

wandb runs in a process of its own, `wandb_process.py`. A thread passes it the records that training
queues. Whatever goes wrong there, from the import of wandb to its last upload, is one warning.
`metrics.jsonl` has the same records.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

import hg_scale
from hg_scale.atomic_write import write_atomic
from hg_scale.bounded_read import RECORD_BYTES, FormatError, read_text

INIT_TIMEOUT = 30.0  # seconds to reach the server
FINISH_TIMEOUT = 30.0  # seconds to finish uploads at the end of a run; the rest stays on disk
_MARGIN = 5.0  # seconds that we wait longer than wandb's own timeout
_POLL = 1.0  # seconds until a process that has ended is noticed
_FALSE = ("", "0", "false", "no", "off")  # of WANDB_DISABLED


class WandbLog:
    """Logs records to wandb; use it on one rank.

    mode: `online`, `offline`, `disabled`, or `auto`, see `choose_mode`. `wandb sync
    RUN/wandb/offline-*` uploads offline runs later.
    resume_step: the step from which this start resumes. Steps up to it that a killed start did not
    get to wandb are filled in from `metrics.jsonl`.
    warn: called at most once, with one line.

    All starts of a run folder are one wandb run, whose id is in `RUN/wandb_id`.
    """

    def __init__(
        self,
        run_dir: Path,
        project: str,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        mode: str = "auto",
        *,
        resume_step: int = 0,
        warn: Callable[[str], None] = print,
        init_timeout: float = INIT_TIMEOUT,
        finish_timeout: float = FINISH_TIMEOUT,
    ) -> None:
        self._options = {
            "run_dir": str(run_dir),
            "project": project,
            "name": name or run_dir.resolve().name,
            "config": dict(config or {}),
            "mode": mode,
            "resume_step": resume_step,
            "init_timeout": init_timeout,
            "finish_timeout": finish_timeout,
            "margin": _MARGIN,
        }
        self._finish_timeout, self._warn = finish_timeout, warn
        self._warned = False
        self._queue: SimpleQueue[dict[str, Any]] = SimpleQueue()  # records, then an exit code
        self._thread = threading.Thread(target=self._run, name="wandb", daemon=True)
        if mode != "disabled":
            self._thread.start()

    def log(self, record: Mapping[str, Any]) -> None:
        """Queue a record with its `step` and return at once.

        wandb ignores steps that it has seen before a restart.
        """
        if self._thread.is_alive():
            self._queue.put(dict(record))

    def finish(self, exit_code: int = 0) -> None:
        """Finish the wandb run; wait for uploads, little more than `finish_timeout` seconds."""
        if not self._thread.is_alive():
            return
        self._queue.put({"exit_code": exit_code})
        self._thread.join(self._finish_timeout + 2 * _MARGIN)
        if self._thread.is_alive():
            self._warn_once("did not finish in time; metrics.jsonl has all records")

    def _run(self) -> None:
        """The thread: start the process, pass it the queued records, report its warning."""
        try:
            with TemporaryDirectory(prefix="hg_scale-wandb-", ignore_cleanup_errors=True) as folder:
                process = _start_process(folder)
                with suppress(BrokenPipeError):  # it has ended, and says why
                    self._feed(process)
                message, _ = process.communicate()
        except Exception as error:
            self._warn_once(f"disabled: {one_line(error)}")
            return
        if message.strip():
            self._warn_once(message.strip())
        elif process.returncode:
            self._warn_once(f"disabled: its process ended with exit code {process.returncode}")

    def _feed(self, process: subprocess.Popen[str]) -> None:
        item = self._options
        while True:
            assert process.stdin is not None
            process.stdin.write(json.dumps(item, default=str) + "\n")
            process.stdin.flush()
            if "exit_code" in item:
                return
            while process.poll() is None:
                with suppress(Empty):
                    item = self._queue.get(timeout=_POLL)
                    break
            else:
                return

    def _warn_once(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"wandb {message}")


def _start_process(folder: str) -> subprocess.Popen[str]:
    """Start wandb's process, with its temporary files in `folder`, which it deletes if this one
    ends first. Its stderr is this one's, the rank's log file.
    """
    root = str(Path(hg_scale.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    changes = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", "TMPDIR": folder}
    return subprocess.Popen(
        [sys.executable, "-m", "hg_scale.training.wandb_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=os.environ | changes,
        start_new_session=True,  # a signal to the run's process group is not for wandb
    )


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def choose_mode() -> str:
    """Return wandb's mode: the one that the user has set, else online with an API key for the
    server, else offline.

    wandb itself reads its environment variables, settings files and netrc. Two spellings that it
    does not take are changed for it: WANDB_MODE in capitals, and WANDB_DISABLED, which wandb took
    in the past and transformers still does. Raises any error of wandb.
    """
    if os.environ.get("WANDB_DISABLED", "").strip().lower() not in _FALSE:
        return "disabled"
    if mode := os.environ.pop("WANDB_MODE", "").strip().lower():
        os.environ["WANDB_MODE"] = mode
    from wandb.sdk import wandb_setup

    settings = wandb_setup.singleton().settings
    if settings.mode != "online" or "mode" in settings.model_fields_set:
        return "offline" if settings.mode == "dryrun" else settings.mode
    from wandb.sdk.lib import wbauth

    key = wbauth.authenticate_session(
        host=settings.base_url, source="hg_scale", prompt=False, update_session=False
    )
    return "online" if key else "offline"


def run_id(run_dir: Path) -> str:
    """Return the wandb id of a run folder; creates `RUN/wandb_id` at the first start."""
    file = run_dir / "wandb_id"
    with suppress(OSError, FormatError):
        if stored := read_text(file, RECORD_BYTES).strip():
            return stored
    new = secrets.token_hex(4)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(file, new + "\n")
    return new
