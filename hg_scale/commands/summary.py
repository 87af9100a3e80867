"""What a run reached, beside general-purpose compressors, and a sample of its text."""

from __future__ import annotations

import argparse
from pathlib import Path

from hg_scale.errors import UserError

HELP = "show what a run reached on held-out text, and a sample of what it writes"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--compare", action="store_true", help="compress the same held-out text with gzip and co."
    )
    parser.add_argument(
        "--sample", type=int, default=0, metavar="N", help="generate N tokens with the last weights"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the sample")


def run(options: argparse.Namespace) -> int:
    if options.sample < 0:
        raise UserError("--sample: expected 0 or more")
    from rich.console import Console

    from hg_scale.evaluation.generation import TEMPERATURE
    from hg_scale.evaluation.summary import comparison, sample_text

    console = Console(highlight=False)
    console.print(comparison(options.run, with_compressors=options.compare))
    if options.sample:
        head = f"\na sample of {options.sample} tokens (temperature {TEMPERATURE}):"
        console.print(head, style="bold")
        console.print(sample_text(options.run, options.sample, options.seed), markup=False)
    return 0
