"""The process in which wandb runs, for `wandb_log.py`.

Reads lines of JSON from stdin: the options of `WandbLog`, records, and an exit code. Prints at most
one line, a warning. It outlives the run, by seconds, however that ends: it then finishes the wandb
run and deletes the temporary files of wandb, which wandb leaves behind when it is killed.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hg_scale.training.wandb_history import logged_steps, missing_records
from hg_scale.training.wandb_log import choose_mode, one_line, run_id

_POLL = 1.0  # seconds


def log_stdin() -> None:
    """Log the records of stdin; never returns."""
    # Slurm signals all processes of a step. This one ends after the run.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    terminal = os.dup(1)  # stdin and stdout are pipes of the run, which wandb must not use
    os.dup2(2, 1)
    code, folder = 0, os.environ["TMPDIR"]  # of this process and wandb's service alone
    try:
        _log_records(lines_of_parent(os.getppid()), folder)
    except BaseException as error:
        os.write(terminal, f"disabled: {one_line(error)}\n".encode())
        code = 1
    _exit(folder, code)


def _log_records(lines: Iterator[bytes], folder: str) -> None:
    options = json.loads(next(lines, b"null"))
    if options is None:  # the run ended first
        return
    mode = choose_mode() if options["mode"] == "auto" else options["mode"]
    run, exit_code = None if mode == "disabled" else _start(options, mode), 1
    for line in lines:
        record = json.loads(line)
        if "exit_code" in record:
            exit_code = record["exit_code"]
            break
        if run is not None:
            run.log(record, step=record.get("step"))
    if run is None:
        return
    limit = threading.Timer(options["finish_timeout"] + options["margin"], _exit, (folder, 1))
    limit.daemon = True
    limit.start()
    import wandb

    run.finish(exit_code=exit_code)
    wandb.teardown()  # ends wandb's service


def _start(options: dict[str, Any], mode: str) -> Any:
    """Start the wandb run, and fill in the steps that an earlier start did not get to it."""
    import wandb

    folder = Path(options["run_dir"])
    known: set[int] | None = None
    with suppress(Exception):  # files of another version: nothing is filled in
        known = logged_steps(folder, run_id(folder))
    run = wandb.init(
        project=options["project"],
        name=options["name"],
        id=run_id(folder),
        resume="allow",
        dir=options["run_dir"],
        config=options["config"],
        mode=mode,  # type: ignore[arg-type]
        settings=wandb.Settings(
            init_timeout=options["init_timeout"],
            finish_timeout=options["finish_timeout"],
            console="off",  # wandb would wrap stdout and stderr
            silent=True,
            x_stats_pid=os.getppid(),  # the process whose CPU and memory wandb records
        ),
    )
    if known is not None:
        with suppress(Exception):  # logging reports what is wrong
            known.update(range(run.step))  # those that the server has
            for record in missing_records(folder, options["resume_step"], known):
                run.log(record, step=record["step"])
    return run


def lines_of_parent(parent: int) -> Iterator[bytes]:
    """Yield the lines of stdin until it is closed or the process `parent` has ended.

    Processes that the parent has forked may hold the other end of the pipe open.
    """
    rest = b""
    while True:
        if select.select([0], [], [], _POLL)[0]:
            chunk = os.read(0, 1 << 16)
            if not chunk:
                return
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
        elif os.getppid() != parent:
            return


def _exit(folder: str, code: int) -> None:
    """End this process at once; hooks of wandb at the exit may wait for its server."""
    shutil.rmtree(folder, ignore_errors=True)
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    log_stdin()
