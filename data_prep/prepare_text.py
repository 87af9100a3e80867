#!/usr/bin/env python
"""Turn text into shuffled shards of tokens for hg_scale, with one process or many.

    python data_prep/prepare_text.py --input corpus/ --tokenizer tok.model --output corpora/text
    mpirun -n 8 python data_prep/prepare_text.py --input a.jsonl.zst b.parquet --output corpora/text
    srun -n 64 python data_prep/prepare_text.py ...

Inputs are files and folders of files: JSON lines (.jsonl, .ndjson, .json), parquet, and anything
else as plain text, each also packed as .gz, .xz or .zst. A line, a row, or a plain file is a
document; --document-separator says where documents end inside plain files. Documents are shuffled
over the whole corpus and end with the tokenizer's end-of-document id. Which split one goes to
follows from its content, so equal documents are never on both sides.

With --split in bytes a single plain file is one text instead: cut by position, not shuffled.

The same input and options give the same shards, byte for byte, with any number of processes, and
also where the preparation was killed and started again, which does what was not done yet. The
output folder, which all processes have to see, takes the size of the unpacked text for the time of
the work. Last of all it gets index.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation

from hg_scale.data.preparation import command_line
from hg_scale.data.preparation.documents import TextFormat
from hg_scale.data.preparation.place import Place, find_place
from hg_scale.data.preparation.shuffled import CHUNK_TOKENS, Job, prepare
from hg_scale.data.preparation.text_corpus import TextCorpus
from hg_scale.data.progress import ProgressBar
from hg_scale.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer


def parse_arguments() -> argparse.Namespace:
    """The command line; exits 2 with the usage where it is wrong."""
    parser = command_line.parser_of(__doc__)
    add = parser.add_argument
    add("--input", type=Path, required=True, nargs="+", metavar="PATH", help="files and folders")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write, new or empty")
    add("--tokenizer", default="bytes", metavar="MODEL", help="a sentencepiece model, or `bytes` "
        "(default)")  # fmt: skip
    command_line.add_format_options(parser)
    add(
        "--split",
        type=command_line.parse_split_or_folders,
        default=(0.9, 0.05, 0.05),
        metavar="TRAIN,VALIDATION,TEST",
        help="fractions that add up to 1 (default: 0.9,0.05,0.05); `folders` where the files lie "
        "below train/, validation/ and test/; or, for one text, bytes from its start",
    )
    command_line.add_file_options(parser)
    command_line.add_shard_options(parser, chunk=CHUNK_TOKENS)
    add(
        "--seed",
        type=command_line.seed,
        default=0,
        help="of the shuffle and the split (default: 0)",
    )
    command_line.add_team_options(parser)
    return parser.parse_args()


def make_job(options: argparse.Namespace, place: Place) -> Job:
    """What the options ask for. Raises DataError."""
    split = options.split
    by_size = split is not None and all(isinstance(part, int) for part in split)
    tokenizer: Tokenizer
    if options.tokenizer == "bytes":
        tokenizer = ByteTokenizer(documents=not by_size)
    else:
        tokenizer = SentencePieceTokenizer.read(Path(options.tokenizer), documents=not by_size)
    inputs = tuple(options.input)
    corpus = TextCorpus(
        inputs,
        tokenizer,
        **command_line.patterns(options.include, options.exclude),
        format=TextFormat(options.field, options.document_separator),
        fractions=None if by_size else split,
        sizes=split if by_size else None,
        seed=options.seed,
    )
    return Job(
        corpus,
        inputs,
        options.output,
        chunk_tokens=options.chunk_tokens,
        shard_tokens=options.shard_tokens,
        place=place,
        patience=options.patience,
    )


def main() -> int:
    """Prepare the data; 2 where the input, the output or an option cannot be used."""
    options, place = parse_arguments(), find_place()

    def work(progress: ProgressBar) -> None:
        start = time.perf_counter()
        job = make_job(options, place)
        index, written = prepare(job, progress)
        if index is not None:
            command_line.report(job.output, index, written, time.perf_counter() - start)

    return command_line.run("prepare_text", work, place)


if __name__ == "__main__":
    sys.exit(main())
