#!/usr/bin/env python
"""Train a sentencepiece tokenizer on a corpus, for prepare_text.py.

    python data_prep/train_tokenizer.py --input corpus/ --vocab-size 32000 --output tok.model

Reads the inputs of prepare_text.py and draws a random sample of them. The model reproduces every
text, byte for byte: nothing is normalised, spaces are kept, and text that is not in the vocabulary
becomes bytes. Id 0 is never used, id 1 ends a document. The same input, options and version of
sentencepiece give the same model.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation

from hg_scale.arguments import local_path, positive_int
from hg_scale.data.preparation import command_line
from hg_scale.data.preparation.documents import TextFormat
from hg_scale.data.preparation.tokenizer_training import TokenizerTraining, train_tokenizer
from hg_scale.data.progress import ProgressBar


def main() -> int:
    """Train a model. Returns 2 where the input, the output or an option cannot be used."""
    parser = command_line.make_parser(__doc__)
    add = parser.add_argument
    add("--input", type=local_path, required=True, nargs="+", metavar="PATH",
        help="files and folders")  # fmt: skip
    add("--output", type=local_path, default=Path("tok.model"), metavar="FILE",
        help="file to write (default: %(default)s)")  # fmt: skip
    add("--vocab-size", type=positive_int, required=True, metavar="N",
        help="number of pieces, including the 256 bytes")  # fmt: skip
    add("--model", choices=("unigram", "bpe"), default="unigram", help="(default: %(default)s)")
    command_line.add_format_options(parser)
    command_line.add_file_options(parser)
    command_line.add_skip_options(parser)
    add("--sample-bytes", type=positive_int, default=TokenizerTraining.sample_bytes,
        metavar="N", help="text to train on; training needs several times that much memory "
        "(default: %(default)s)")  # fmt: skip
    add("--seed", type=command_line.parse_seed, default=0, help="seed of the sample (default: 0)")
    options = parser.parse_args()

    def work(progress: ProgressBar) -> None:
        job = TokenizerTraining(
            tuple(options.input),
            options.output,
            options.vocab_size,
            options.model,
            **command_line.patterns(options.include, options.exclude),
            format=TextFormat(options.field, options.document_separator),
            sample_bytes=options.sample_bytes,
            seed=options.seed,
            policy=command_line.skip_policy(options),
        )
        trained = train_tokenizer(job, progress)
        rate = trained.sample_bytes / trained.sample_tokens
        print(
            f"{job.output}: {job.model}, {job.vocab_size} pieces, trained on "
            f"{trained.sample_bytes / 1e6:.1f} MB, {rate:.2f} bytes per token"
        )
        for line in (*trained.source.lines(), *trained.log.report(job.skipped_list)):
            print(line)

    return command_line.run_preparation("train_tokenizer", work)


if __name__ == "__main__":
    sys.exit(main())
