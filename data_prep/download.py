#!/usr/bin/env python
"""Download a benchmark corpus: enwik8 or text8, 100 MB of Wikipedia each.

    python data_prep/download.py enwik8

Writes corpora/sources/enwik8 once its checksum is right. Without a network, put the file or its
.zip there yourself; it is then checked (and unpacked).
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation

from hg_scale.arguments import local_path
from hg_scale.data.preparation import command_line
from hg_scale.data.preparation.download import CORPORA, fetch
from hg_scale.data.progress import ProgressBar


def main() -> int:
    """Download the corpus. Returns 2 where that fails."""
    parser = command_line.make_parser(__doc__)
    add = parser.add_argument
    add("corpus", choices=sorted(CORPORA))
    add("--output", type=local_path, default=Path("corpora/sources"), metavar="DIR",
        help="folder to write it to (default: %(default)s)")  # fmt: skip
    add("--url", help="URL of another copy of the .zip")
    options = parser.parse_args()

    def work(progress: ProgressBar) -> None:
        corpus = CORPORA[options.corpus]
        if options.url:
            corpus = dataclasses.replace(corpus, url=options.url)
        path, fetched = fetch(corpus, options.output, progress)
        what = "downloaded" if fetched else "already exists"
        print(f"{path}: {what}, {path.stat().st_size:,} bytes, {corpus.algorithm} is correct")

    return command_line.run_preparation("download", work)


if __name__ == "__main__":
    sys.exit(main())
