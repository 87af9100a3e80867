#!/usr/bin/env python
"""Fetch a benchmark corpus: enwik8 or text8, 100 MB of Wikipedia each.

    python data_prep/download.py enwik8

Writes corpora/sources/enwik8 once its checksum is right, and goes on where an earlier try ended.
Without a network, place the file or its .zip there by hand; it is then checked (and unpacked).
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation

from hg_scale.data.preparation import command_line
from hg_scale.data.preparation.download import CORPORA, fetch
from hg_scale.data.progress import ProgressBar


def main() -> int:
    """Fetch it; 2 where that cannot be done."""
    parser = command_line.parser_of(__doc__)
    add = parser.add_argument
    add("corpus", choices=sorted(CORPORA))
    add("--output", type=Path, default=Path("corpora/sources"), metavar="DIR", help="folder to put "
        "it in (default: %(default)s)")  # fmt: skip
    add("--url", help="another place to fetch the .zip from")
    options = parser.parse_args()

    def work(progress: ProgressBar) -> None:
        corpus = CORPORA[options.corpus]
        if options.url:
            corpus = dataclasses.replace(corpus, url=options.url)
        path, fetched = fetch(corpus, options.output, progress)
        what = "fetched" if fetched else "is there already"
        print(f"{path}: {what}, {path.stat().st_size:,} bytes, {corpus.algorithm} as it should be")

    return command_line.run("download", work)


if __name__ == "__main__":
    sys.exit(main())
