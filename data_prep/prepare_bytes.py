#!/usr/bin/env python
"""Turn a text file or a folder of files into shards of byte tokens for hg_scale.

    python data_prep/prepare_bytes.py --input enwik8.xz --output corpora/enwik8 \\
        --split 90000000,5000000,5000000
    python data_prep/prepare_bytes.py --input src/ --include '*.py' --output corpora/src

A file (plain, .gz, .xz or .zst) is one text: ids 0..255, split by position. In a folder each file
is a document: it goes whole into one split, by a hash of its text, and ends with the id 256. The
order is that of the source, and one process does it all; prepare_text.py shuffles, takes other
formats and tokenizers, and many processes. The output folder gets tar shards for webdataset and,
last of all, index.json. The same input and options always give the same bytes; run again on
finished output, it says so and changes nothing.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation

from hg_scale.data.preparation import command_line
from hg_scale.data.preparation.in_order import Preparation, prepare_bytes
from hg_scale.data.preparation.place import find_place
from hg_scale.data.preparation.sources import text_length
from hg_scale.data.progress import ProgressBar


def main() -> int:
    """Prepare the data; 2 where the input, the output or an option cannot be used."""
    parser = command_line.parser_of(__doc__)
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="PATH", help="text file or folder of files")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write, new or empty")
    add(
        "--split",
        type=command_line.parse_split,
        default=Preparation.split,
        metavar="TRAIN,VALIDATION,TEST",
        help="fractions that add up to 1, or (for a file) bytes taken from its start one after the "
        "other; what is left then stays out (default: 0.9,0.05,0.05)",
    )
    command_line.add_file_options(parser)
    command_line.add_shard_options(parser, chunk=Preparation.chunk_tokens)
    add("--seed", type=command_line.seed, default=0, help="of the split of a folder (default: 0)")
    options = vars(parser.parse_args())
    options |= command_line.patterns(options["include"], options["exclude"])
    if find_place().rank:
        return 0  # it takes one process

    def work(progress: ProgressBar) -> None:
        start = time.perf_counter()
        job = Preparation(**options)
        index, written = prepare_bytes(job, progress)
        command_line.report(job.output, index, written, time.perf_counter() - start)
        if written and job.by_size and (rest := text_length(job.input) - sum(job.split)):
            print(f"  {rest:,} bytes after these are in no split: --split takes no more")

    return command_line.run("prepare_bytes", work)


if __name__ == "__main__":
    sys.exit(main())
