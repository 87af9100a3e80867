"""Logging to Weights & Biases that can neither stop nor slow a run.

Training puts records into a queue; a thread starts wandb and logs them. An error in wandb is one
warning and ends the thread. `metrics.jsonl` has the same records.
"""

from __future__ import annotations

import netrc
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal
from urllib.parse import urlsplit

Mode = Literal["online", "offline", "disabled"]

INIT_TIMEOUT = 30.0  # seconds to reach the server
FINISH_TIMEOUT = 30.0  # seconds to finish uploads at the end of a run; the rest stays on disk
_MARGIN = 5.0  # seconds that we wait longer than wandb's own timeout


class WandbLog:
    """Logs records to wandb; use it on one rank.

    mode: `auto` is WANDB_MODE, or if that is not set `online` with an API key and `offline` without
    (`wandb sync RUN/wandb/offline-*` uploads later).
    warn: called at most once, with one line.

    All starts of a run folder are one wandb run, whose id is in `RUN/wandb_id`.
    """

    def __init__(
        self,
        run_dir: Path,
        project: str,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        mode: Mode | Literal["auto"] = "auto",
        *,
        warn: Callable[[str], None] = print,
        init_timeout: float = INIT_TIMEOUT,
        finish_timeout: float = FINISH_TIMEOUT,
    ) -> None:
        self.run_dir, self.project, self.name = run_dir, project, name or run_dir.resolve().name
        self.mode: Mode = choose_mode() if mode == "auto" else mode
        self.init_timeout, self.finish_timeout = init_timeout, finish_timeout
        self._config, self._warn = dict(config or {}), warn
        self._warned = False
        self._queue: SimpleQueue[dict[str, Any] | int] = SimpleQueue()  # records, then an exit code
        self._thread = threading.Thread(target=self._run, name="wandb", daemon=True)
        if self.mode != "disabled":
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
        self._queue.put(exit_code)
        self._thread.join(self.finish_timeout + _MARGIN)
        if self._thread.is_alive():
            self._warn_once("did not finish in time; metrics.jsonl has all records")

    def _run(self) -> None:
        """The thread: start wandb, log the queued records, finish."""
        try:
            run = self._start()
            while isinstance(item := self._queue.get(), dict):
                run.log(item, step=item.get("step"))
            run.finish(exit_code=item)
        except (Exception, SystemExit) as error:
            message = " ".join(str(error).split()) or type(error).__name__
            self._warn_once(f"disabled: {message}")

    def _start(self) -> Any:
        import wandb

        return wandb.init(
            project=self.project,
            name=self.name,
            id=run_id(self.run_dir),
            resume="allow",
            dir=str(self.run_dir),
            config=self._config,
            mode=self.mode,
            settings=wandb.Settings(
                init_timeout=self.init_timeout,
                finish_timeout=self.finish_timeout,
                console="off",  # wandb would wrap stdout and stderr
                silent=True,
            ),
        )

    def _warn_once(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"wandb {message}")


def choose_mode() -> Mode:
    """Return WANDB_MODE if it is set, else online if there is an API key, else offline."""
    mode = os.environ.get("WANDB_MODE")
    if mode in ("online", "offline", "disabled"):
        return mode  # type: ignore[return-value]
    return "online" if _has_api_key() else "offline"


def _has_api_key() -> bool:
    """Whether the environment or the netrc file (of `wandb login`) has a key for the server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(str(file)).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def run_id(run_dir: Path) -> str:
    """Return the wandb id of a run folder; creates `RUN/wandb_id` at the first start."""
    file = run_dir / "wandb_id"
    if file.exists() and (stored := file.read_text().strip()):
        return stored
    new = secrets.token_hex(4)
    run_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(new + "\n")
    return new
