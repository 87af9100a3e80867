#!/usr/bin/env python
"""Turn images into shards of sub-pixels for hg_scale, with one process or many.

    python data_prep/prepare_images.py --input imagenet32/ --split folders \\
        --output corpora/imagenet32
    mpirun -n 8 python data_prep/prepare_images.py --input train.npz --output corpora/digits

Inputs are pictures (.png, .jpg, .webp, .gif, .bmp, .tif, .ppm, .avif), folders of them, and arrays:
.npy and .npz with uint8 (N, H, W, 3), (N, H, W) or (H, W, 3). All images need the same size. Each
becomes a document of H x W x 3 values 0..255 (H x W for gray ones) in row-major order, red, green
and blue adjacent, without an end-of-document id: the index contains the length. Images are
shuffled. With `--split folders` the files below train/, validation/ (or val/) and test/ are in that
split; else the split of an image follows from its content.

As with prepare_text.py, any number of processes writes the same shards, also after a restart.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation

from hg_scale.data.errors import DataError
from hg_scale.data.preparation import command_line
from hg_scale.data.preparation.image_arrays import LAYOUTS, ArrayOptions
from hg_scale.data.preparation.image_files import describe_shape
from hg_scale.data.preparation.images import ImageCorpus
from hg_scale.data.preparation.shuffled import CHUNK_TOKENS, Job, prepare
from hg_scale.data.progress import ProgressBar


def main() -> int:
    """Prepare the data. Returns 2 where the input, the output or an option cannot be used."""
    parser = command_line.make_parser(__doc__)
    add = parser.add_argument
    command_line.add_input_and_output(parser)
    add(
        "--split",
        type=command_line.parse_split_or_folders,
        default=ImageCorpus.fractions,
        metavar="TRAIN,VALIDATION,TEST",
        help="fractions that add up to 1, or `folders` (default: 0.9,0.05,0.05)",
    )
    add("--array", metavar="NAME", help="name of the images in .npz files with several arrays")
    add("--array-layout", type=str.upper, choices=LAYOUTS, help="axes of the arrays: N images, H "
        "rows, W columns, C channels (default: where the shape leaves no doubt)")  # fmt: skip
    command_line.add_file_options(parser)
    command_line.add_skip_options(parser)
    command_line.add_shard_options(parser, chunk=None)
    add(
        "--seed",
        type=command_line.parse_seed,
        default=0,
        help="seed of the shuffle and the split (default: 0)",
    )
    command_line.add_rank_options(parser)
    options, launch = parser.parse_args(), command_line.find_launch(parser)

    def work(progress: ProgressBar) -> None:
        start = time.perf_counter()
        split = options.split
        if split is not None and all(isinstance(part, int) for part in split):
            raise DataError(
                "--split in bytes is for text; set it to fractions such as 0.9,0.05,0.05"
            )
        inputs = tuple(options.input)
        corpus = ImageCorpus(
            inputs,
            **command_line.patterns(options.include, options.exclude),
            fractions=split,
            seed=options.seed,
            array=ArrayOptions(options.array, options.array_layout),
        )
        job = Job(
            corpus,
            inputs,
            options.output,
            chunk_tokens=options.chunk_tokens or CHUNK_TOKENS,
            shard_tokens=options.shard_tokens,
            launch=launch,
            patience=options.patience,
            policy=command_line.skip_policy(options),
        )
        index, written = prepare(job, progress)
        if index is not None:
            seconds = time.perf_counter() - start
            command_line.report(job.output, index, written, seconds, job.log, corpus.remarks())
            print(f"  images of {describe_shape(corpus.shape)}: sequence_length "
                  f"{index.document_tokens}")  # fmt: skip

    return command_line.run_preparation("prepare_images", work, launch)


if __name__ == "__main__":
    sys.exit(main())
