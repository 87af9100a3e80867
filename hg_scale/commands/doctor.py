"""`hg-scale doctor`: check this machine before training."""

from __future__ import annotations

import argparse
from pathlib import Path

from hg_scale.arguments import local_path

HELP = "check this machine: versions, driver, network, limits, disk; with remedies"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run", type=local_path, default=Path("runs"), metavar="DIR",
        help="where runs will be written (default: runs)",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Print all findings; return 1 if one is wrong."""
    from rich.console import Console
    from rich.text import Text

    from hg_scale.parallel.doctor import examine

    console = Console(highlight=False, soft_wrap=True)
    styles = {"ok": "green", "note": "yellow", "wrong": "bold red"}
    wrong = 0
    for finding in examine(options.run):
        wrong += finding.state == "wrong"
        line = Text.assemble(
            (f"{finding.state:5}", styles[finding.state]), f"  {finding.topic:13} {finding.message}"
        )
        console.print(line)
        if finding.remedy:
            console.print(f"{'':21}-> {finding.remedy}", markup=False)
    return int(wrong > 0)
