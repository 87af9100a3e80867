"""Weights & Biases beside `metrics.jsonl`, so that it can never stop or slow a run.

A thread of its own starts wandb and hands it the records; training only puts them into a queue.
Whatever goes wrong there is one warning, after which the thread is done.
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

INIT_TIMEOUT = 30.0  # seconds until an unreachable server is given up
FINISH_TIMEOUT = 30.0  # seconds the end of a run waits for uploads; what is missing stays on disk
_MARGIN = 5.0  # seconds between wandb's own limit and ours


class WandbLog:
    """Sends records to wandb, from the one rank that makes it.

    `auto` is what WANDB_MODE says; without it `online` where an API key is found, else `offline`
    (`wandb sync RUN/wandb/offline-*` uploads later). All starts of a run folder are one run there:
    its id stands in `RUN/wandb_id`. `warn` is told at most once, in one line.
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
        """Hand over a record with its `step`; returns at once.

        Steps that wandb saw before a restart are not recorded twice.
        """
        if self._thread.is_alive():
            self._queue.put(dict(record))

    def finish(self, exit_code: int = 0) -> None:
        """End the run there; waits at most a little over `finish_timeout` seconds."""
        if not self._thread.is_alive():
            return
        self._queue.put(exit_code)
        self._thread.join(self.finish_timeout + _MARGIN)
        if self._thread.is_alive():
            self._warn_once("did not finish in time; what is missing there is in metrics.jsonl")

    def _run(self) -> None:
        """The thread: start wandb, pass on records, finish."""
        try:
            run = self._start()
            while isinstance(item := self._queue.get(), dict):
                run.log(item, step=item.get("step"))
            run.finish(exit_code=item)
        except (Exception, SystemExit) as error:
            said = " ".join(str(error).split()) or type(error).__name__
            self._warn_once(f"disabled: {said}")

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
                console="off",  # it would wrap stdout and stderr
                silent=True,
            ),
        )

    def _warn_once(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"wandb {message}")


def choose_mode() -> Mode:
    """WANDB_MODE, else online where there is an API key for its server."""
    said = os.environ.get("WANDB_MODE")
    if said in ("online", "offline", "disabled"):
        return said  # type: ignore[return-value]
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    """A key in the environment or in the netrc file, where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(str(file)).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def run_id(run_dir: Path) -> str:
    """The id of this run folder at wandb, made at its first start."""
    file = run_dir / "wandb_id"
    if file.exists() and (known := file.read_text().strip()):
        return known
    new = secrets.token_hex(4)
    run_dir.mkdir(parents=True, exist_ok=True)
    file.write_text(new + "\n")
    return new
