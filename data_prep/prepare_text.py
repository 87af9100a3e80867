#!/usr/bin/env python
"""Turn text into shuffled shards of tokens for hg_scale, with one process or many.

    python data_prep/prepare_text.py --input corpus/ --tokenizer tok.model --output corpora/text
    mpirun -n 8 python data_prep/prepare_text.py --input a.jsonl.zst b.parquet --output corpora/text
    srun -n 64 python data_prep/prepare_text.py ...

Inputs are files and folders of files: Parquet and Arrow, recognised by their contents, JSON lines
(.jsonl, .ndjson, .json), .csv and .tsv, and any other text; each also compressed with gzip, xz,
zstd or bzip2. A line, a row, or a plain file is a document; --document-separator separates
documents inside plain files. Other binary files are refused; hidden and side files of a folder are
left out, and the last lines printed say so. Documents are shuffled over
the entire corpus and end with the tokenizer's end-of-document id. The split of a document follows
from its content, so equal documents are always in the same split.

With --split in bytes a single plain file is one text instead: split by position, not shuffled.

The same input and options give the same shards, byte for byte, with any number of processes, and
also where the preparation was killed and started again, which resumes it. The output folder has to
be visible to all processes and needs room for the decompressed text until the work is done. The
last file written is index.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation

from hg_scale.arguments import local_path
from hg_scale.data.preparation import command_line
from hg_scale.data.preparation.documents import TextFormat
from hg_scale.data.preparation.shuffled import CHUNK_TOKENS, Job, prepare
from hg_scale.data.preparation.text_corpus import TextCorpus
from hg_scale.data.progress import ProgressBar
from hg_scale.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer
from hg_scale.parallel.launch import Launch


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_line.make_parser(__doc__)
    add = parser.add_argument
    command_line.add_input_and_output(parser)
    add("--tokenizer", type=local_path, default="bytes", metavar="MODEL",
        help="a sentencepiece model, or `bytes` (default)")  # fmt: skip
    command_line.add_format_options(parser)
    add(
        "--split",
        type=command_line.parse_split_or_folders,
        default=(0.9, 0.05, 0.05),
        metavar="TRAIN,VALIDATION,TEST",
        help="fractions that add up to 1 (default: 0.9,0.05,0.05); `folders` where the files are "
        "below train/, validation/ and test/; or, for one text, bytes from its start",
    )
    command_line.add_file_options(parser)
    command_line.add_as_they_are_option(parser)
    command_line.add_skip_options(parser)
    command_line.add_shard_options(parser, chunk=CHUNK_TOKENS)
    add(
        "--seed",
        type=command_line.parse_seed,
        default=0,
        help="seed of the shuffle and the split (default: 0)",
    )
    command_line.add_rank_options(parser)
    return parser


def make_job(options: argparse.Namespace, launch: Launch) -> Job:
    """Build the job from the options. Raises DataError."""
    split = options.split
    by_size = split is not None and all(isinstance(part, int) for part in split)
    tokenizer: Tokenizer
    if str(options.tokenizer) == "bytes":
        tokenizer = ByteTokenizer(documents=not by_size)
    else:
        tokenizer = SentencePieceTokenizer.read(options.tokenizer, documents=not by_size)
    inputs = tuple(options.input)
    corpus = TextCorpus(
        inputs,
        tokenizer,
        **command_line.patterns(options.include, options.exclude),
        format=TextFormat(options.field, options.document_separator, options.as_they_are),
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
        launch=launch,
        patience=options.patience,
        policy=command_line.skip_policy(options),
    )


def main() -> int:
    """Prepare the data. Returns 2 where the input, the output or an option cannot be used."""
    parser = make_parser()
    options, launch = parser.parse_args(), command_line.find_launch(parser)

    def work(progress: ProgressBar) -> None:
        start = time.perf_counter()
        job = make_job(options, launch)
        index, written = prepare(job, progress)
        if index is not None:
            seconds = time.perf_counter() - start
            command_line.report(job.output, index, written, seconds, job.log, job.corpus.remarks())

    return command_line.run_preparation("prepare_text", work, launch)


if __name__ == "__main__":
    sys.exit(main())
