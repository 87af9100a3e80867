"""`hg-scale status RUN`: show the state of a run from its folder."""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import TYPE_CHECKING

from hg_scale.arguments import local_path
from hg_scale.errors import UserError

if TYPE_CHECKING:
    from rich.text import Text

    from hg_scale.training.monitoring.status import RunStatus

HELP = "show the state of a run: alive or not, step, loss, speed, checkpoint, restarts, errors"
EPILOG = """exit code, the highest of all runs: 0 running, 10 finished, 11 waiting to start again;
20 stalled, 21 dead, 22 failed, 23 saved and not started again, 24 cancelled, 25 unknown"""
_SHORTEST = 0.2  # seconds between two refreshes


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("runs", type=local_path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--errors", type=int, default=5, metavar="N",
                        help="error lines to show at most (default: 5)")  # fmt: skip
    parser.add_argument("--json", action="store_true",
                        help="print a JSON object per run, on a line of its own")  # fmt: skip
    parser.add_argument("--watch", type=float, nargs="?", const=5.0, metavar="SECONDS",
                        help="refresh until no run is running or waiting (default: every 5 "
                        "seconds)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    if options.errors < 0:
        raise UserError("--errors: expected 0 or more")
    if options.watch is not None and not _SHORTEST <= options.watch < math.inf:
        raise UserError(f"--watch: expected at least {_SHORTEST} seconds")
    if options.watch is None:
        return _show(options, _read(options))
    return _watch(options)


def _read(options: argparse.Namespace) -> list[RunStatus]:
    from hg_scale.training.monitoring.status import read_status

    return [read_status(folder, last_errors=options.errors) for folder in options.runs]


def _show(options: argparse.Namespace, found: list[RunStatus]) -> int:
    """Print the status of the runs once. Returns the exit code."""
    from rich.console import Console

    if options.json:
        for status in found:
            print(json.dumps(status.values, allow_nan=False), flush=True)
    else:
        Console(highlight=False, soft_wrap=True).print(_text(options, found))
    return _exit_code(found)


def _exit_code(found: list[RunStatus]) -> int:
    return max(status.values["exit_code"] for status in found)


def _text(options: argparse.Namespace, found: list[RunStatus]) -> Text:
    """Return the status of the runs as lines."""
    from rich.text import Text

    text = Text()
    for folder, status in zip(options.runs, found, strict=True):
        text.append("\n\n" if text else "").append(str(folder), "bold")
        for label, value in status.lines.items():
            text.append(f"\n  {label:11} {value}")
        for line in status.errors:
            text.append(f"\n  | {line}")
    return text


def _watch(options: argparse.Namespace) -> int:
    """Show the status again and again, in place on a terminal, until no run is active."""
    from rich.console import Console
    from rich.live import Live

    found = _read(options)
    console = Console(highlight=False)
    if options.json or not console.is_terminal:
        while _active(found):
            _show(options, found)
            time.sleep(options.watch)
            found = _read(options)
        return _show(options, found)
    with Live(_text(options, found), console=console, auto_refresh=False) as live:
        while _active(found):
            time.sleep(options.watch)
            found = _read(options)
            live.update(_text(options, found), refresh=True)
    return _exit_code(found)


def _active(found: list[RunStatus]) -> bool:
    return any(status.state in ("running", "stalled", "waiting") for status in found)
