"""Show held-out bits per byte of a run, compared with compressors, and a sample."""

from __future__ import annotations

import argparse

from hg_scale.arguments import local_path
from hg_scale.errors import UserError

HELP = "show held-out bits per byte of a run and a sample of generated text"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=local_path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="compress the same held-out text with gzip, bzip2 and xz",
    )
    parser.add_argument(
        "--sample",
        type=int,
        default=0,
        metavar="N",
        help="generate N tokens with the newest checkpoint",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the sample")


def run(options: argparse.Namespace) -> int:
    if options.sample < 0:
        raise UserError("--sample: expected 0 or more")
    from rich.console import Console

    from hg_scale.evaluation.generation import TEMPERATURE
    from hg_scale.evaluation.summary import comparison, sample_text

    console = Console(highlight=False)
    console.print(comparison(options.run, with_compressors=options.compare))
    if options.sample:
        head = f"\nsample of {options.sample} tokens (temperature {TEMPERATURE}):"
        console.print(head, style="bold")
        console.print(sample_text(options.run, options.sample, options.seed), markup=False)
    return 0
