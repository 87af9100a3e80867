"""One page about a run, or about several beside each other."""

from __future__ import annotations

import argparse
from pathlib import Path

from hg_scale.commands.user_errors import refuse_unwritable
from hg_scale.errors import UserError

HELP = "write one HTML page about a run, or several beside each other"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="run folders")
    add("--output", type=Path, metavar="FILE",
        help="the page (default: RUN/report.html, or ./report.html for several runs)")  # fmt: skip
    add("--sample", type=int, default=400, metavar="N",
        help="tokens that each run writes (default: 400; 0: none)")  # fmt: skip
    add("--seed", type=int, default=1, help="of the samples (default: 1)")
    add("--no-compare", action="store_true", help="leave out gzip and co. on the held-out text")


def run(options: argparse.Namespace) -> int:
    if options.sample < 0:
        raise UserError("--sample: expected 0 or more")
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from hg_scale.evaluation.report.baselines import find_baselines
    from hg_scale.evaluation.report.page import ReportPage, render
    from hg_scale.evaluation.report.run_folder import read_runs
    from hg_scale.evaluation.report.samples import sample_of

    runs = read_runs(options.runs)
    output = options.output or (runs[0].path if len(runs) == 1 else Path()) / "report.html"
    refuse_unwritable(output)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    terminal = Console(stderr=True)
    with Progress(
        *columns, console=terminal, transient=True, disable=not terminal.is_terminal
    ) as progress:
        task = progress.add_task("reading")

        def doing(what: str) -> None:
            progress.update(task, description=what)

        baselines, reasons = ([], []) if options.no_compare else find_baselines(runs, doing)
        samples = []
        for one in runs if options.sample else ():
            doing(f"{one.name} writes")
            samples.append(sample_of(one, options.sample, options.seed))
    page = render(ReportPage(runs, baselines, reasons, samples))
    output.write_text(page, encoding="utf-8")
    print(f"report: {output} ({len(page.encode()):,} bytes)")
    return 0
