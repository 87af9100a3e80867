"""Write one HTML page about a run, or a comparison of several."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from hg_scale.arguments import local_path
from hg_scale.atomic_write import write_atomic
from hg_scale.commands.user_errors import refuse_unwritable
from hg_scale.errors import UserError

_SHORTEST = 1  # seconds between two pages
HELP = "write an HTML report of a run, or a comparison of several"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", type=local_path, nargs="+", metavar="RUN", help="run folders")
    add("--output", type=local_path, metavar="FILE",
        help="output file (default: RUN/report.html, or ./report.html for "
        "several)")  # fmt: skip
    add("--sample", type=int, default=400, metavar="N",
        help="tokens to generate per run (default: 400; 0: none)")  # fmt: skip
    add("--watch", type=float, nargs="?", const=60.0, metavar="SECONDS",
        help="write the page again until no run is running (default: every 60 seconds); a browser "
        "reloads it")  # fmt: skip
    add("--seed", type=int, default=1, help="seed of the samples (default: 1)")
    add(
        "--no-compare",
        action="store_true",
        help="do not compress the held-out text with gzip, bzip2 and xz",
    )


def run(options: argparse.Namespace) -> int:
    if options.sample < 0:
        raise UserError("--sample: expected 0 or more")
    if options.watch is not None and not _SHORTEST <= options.watch < math.inf:
        raise UserError(f"--watch: expected at least {_SHORTEST} seconds")
    while True:
        active = _write(options)
        if options.watch is None or not active:
            return 0
        time.sleep(options.watch)


def _write(options: argparse.Namespace) -> bool:
    """Write the page once. Returns whether a run is running."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from hg_scale.evaluation.report.baselines import find_baselines
    from hg_scale.evaluation.report.page import ReportContents, render
    from hg_scale.evaluation.report.run_folder import read_runs
    from hg_scale.evaluation.report.samples import generate_run_sample

    runs = read_runs(options.runs)
    output = options.output or (runs[0].path if len(runs) == 1 else Path()) / "report.html"
    refuse_unwritable(output)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    terminal = Console(stderr=True)
    with Progress(
        *columns, console=terminal, transient=True, disable=not terminal.is_terminal
    ) as progress:
        task = progress.add_task("reading")

        def show(step: str) -> None:
            progress.update(task, description=step)

        baselines, reasons = ([], []) if options.no_compare else find_baselines(runs, show)
        samples = []
        for one in runs if options.sample else ():
            show(f"{one.name}: generating a sample")
            samples.append(generate_run_sample(one, options.sample, options.seed))
    active = any(run.state == "running" for run in runs)
    refresh = max(1, round(options.watch)) if options.watch and active else None
    page = render(ReportContents(runs, baselines, reasons, samples, refresh))
    if options.watch is None:
        output.write_text(page, encoding="utf-8")
    else:  # a browser may be loading it
        write_atomic(output, page)
    print(f"report: {output} ({len(page.encode()):,} bytes)", flush=True)
    return active
