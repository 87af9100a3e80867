#!/usr/bin/env python
"""Turn a text file or a folder of files into shards of byte tokens for hg_scale.

    python data_prep/prepare_bytes.py --input enwik8.xz --output corpora/enwik8 \\
        --split 90000000,5000000,5000000
    python data_prep/prepare_bytes.py --input src/ --include '*.py' --output corpora/src

A file (plain, or compressed with gzip, xz, zstd or bzip2) is one text: ids 0..255, split by
position. In a folder each file is a document: it is in one split, chosen by a hash of its text, and
ends with the id 256. The order is that of the source, and one process does all the work;
prepare_text.py shuffles, reads other formats, and supports other tokenizers and many processes. The
output folder gets tar shards for webdataset and then index.json. The same input and options always
give the same bytes; on finished output the script reports that and changes nothing.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation

from hg_scale.data.preparation import command_line
from hg_scale.data.preparation.in_order import Preparation, prepare_bytes
from hg_scale.data.preparation.skipping import SkipPolicy
from hg_scale.data.preparation.sources import text_length
from hg_scale.data.progress import ProgressBar


def main() -> int:
    """Prepare the data. Returns 2 where the input, the output or an option cannot be used."""
    parser = command_line.make_parser(__doc__)
    add = parser.add_argument
    command_line.add_input_and_output(parser, several=False)
    add(
        "--split",
        type=command_line.parse_split,
        default=Preparation.split,
        metavar="TRAIN,VALIDATION,TEST",
        help="fractions that add up to 1, or (for a file) bytes, counted from its start, after "
        "which the rest is left out (default: 0.9,0.05,0.05)",
    )
    command_line.add_file_options(parser)
    command_line.add_as_they_are_option(parser)
    command_line.add_skip_options(parser)
    command_line.add_shard_options(parser, chunk=Preparation.chunk_tokens)
    add("--seed", type=command_line.parse_seed, default=0, help="seed of the split of a folder "
        "(default: 0)")  # fmt: skip
    options = vars(parser.parse_args())
    options |= command_line.patterns(options["include"], options["exclude"])
    options["policy"] = SkipPolicy(options.pop("on_fault"), options.pop("max_skipped"))
    if command_line.find_launch(parser).rank:
        return 0  # one process does all the work

    def work(progress: ProgressBar) -> None:
        start = time.perf_counter()
        job = Preparation(**options)
        index, written = prepare_bytes(job, progress)
        seconds = time.perf_counter() - start
        command_line.report(job.output, index, written, seconds, job.log, job.summary.lines())
        length = text_length(job.input, as_it_is=job.as_they_are) if job.by_size else 0
        if written and job.by_size and (rest := length - sum(job.split)):
            print(f"  {rest:,} bytes after these are in no split: --split does not cover them")

    return command_line.run_preparation("prepare_bytes", work)


if __name__ == "__main__":
    sys.exit(main())
