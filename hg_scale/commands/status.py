"""`hg-scale status RUN`: show the state of a run from its folder."""

from __future__ import annotations

import argparse

from hg_scale.arguments import local_path

HELP = "show the state of a run: alive or not, step, loss, speed, checkpoint, restarts, errors"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=local_path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--errors", type=int, default=5, metavar="N",
                        help="error lines to show at most (default: 5)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from hg_scale.training.monitoring.status import read_status

    console = Console(highlight=False, soft_wrap=True, markup=False)
    for number, folder in enumerate(options.runs):
        status = read_status(folder, last_errors=options.errors)
        if number:
            console.print()
        console.print(str(folder), style="bold")
        for label, value in status.lines.items():
            console.print(f"  {label:11} {value}")
        for line in status.errors if options.errors else []:
            console.print(f"  | {line}")
    return 0
