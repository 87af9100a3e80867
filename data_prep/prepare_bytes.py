#!/usr/bin/env python
"""Turn a text file or a folder of files into shards of byte tokens for hg_scale.

    python data_prep/prepare_bytes.py --input enwik8.xz --output corpora/enwik8 \\
        --split 90000000,5000000,5000000
    python data_prep/prepare_bytes.py --input src/ --include '*.py' --output corpora/src

A file (plain, .gz or .xz) is one text: ids 0..255, split by position. In a folder each file is a
document: it goes whole into one split, by a hash of its path, and ends with the id 256. The output
folder gets tar shards for webdataset and, last of all, index.json. The same input and options
always give the same bytes; run again on finished output, it says so and changes nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout needs no installation

from hg_scale.data.errors import DataError
from hg_scale.data.index import SPLITS, Index
from hg_scale.data.prepare import Preparation, Track, prepare_bytes


def parse_arguments(arguments: list[str] | None = None) -> Preparation:
    """The command line as a `Preparation`. Raises DataError, or exits 2 with the usage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", type=Path, required=True, metavar="PATH", help="text file or folder of files")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write, new or empty")
    add(
        "--split",
        type=parse_split,
        default=Preparation.split,
        metavar="TRAIN,VALIDATION,TEST",
        help="fractions that add up to 1, or (for a file) bytes taken from its start one after the "
        "other (default: 0.9,0.05,0.05)",
    )
    add(
        "--include",
        action="append",
        metavar="GLOB",
        help="take these files of a folder only, by name or relative path, repeatable (default: "
        "all)",
    )
    add(
        "--exclude",
        action="append",
        default=[],
        metavar="GLOB",
        help="leave these files of a folder out, repeatable",
    )
    add(
        "--chunk-tokens",
        type=positive,
        default=Preparation.chunk_tokens,
        metavar="N",
        help="tokens of a tar member (default: %(default)s)",
    )
    add(
        "--shard-tokens",
        type=positive,
        metavar="N",
        help="tokens of a shard (default: equal shards of about 1 Mi tokens, 16 at least; larger "
        "ones, up to 64 Mi, past 256 of them)",
    )
    add("--seed", type=int, default=0, help="of the split of a folder (default: 0)")
    options = vars(parser.parse_args(arguments))
    options["include"] = tuple(options["include"] or ("*",))
    options["exclude"] = tuple(options["exclude"])
    return Preparation(**options)


def parse_split(text: str) -> tuple[float, ...] | tuple[int, ...]:
    """Three byte counts or three fractions of one."""
    words = text.split(",")
    try:
        if len(words) == len(SPLITS) and sum(sizes := [int(word) for word in words]) > 1:
            if min(sizes) >= 0:
                return tuple(sizes)
            raise argparse.ArgumentTypeError(f"{text!r}: a size is negative")
    except ValueError:
        pass  # fractions
    try:
        parts = tuple(float(word) for word in words)
    except ValueError:
        parts = ()
    if len(parts) != len(SPLITS) or min(parts) < 0 or abs(sum(parts) - 1) > 1e-6:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected three fractions that add up to 1, or three numbers of bytes"
        )
    return parts


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


@contextmanager
def progress_bar() -> Iterator[Track | None]:
    """A bar with bytes/s on stderr where that is a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def track(what: str, total: int | None) -> Callable[[int], None]:
            task = progress.add_task(what, total=total)
            return lambda count: progress.advance(task, count)

        yield track


def summary(index: Index) -> str:
    """A line a split."""
    return "\n".join(
        f"  {name:<10} {split.tokens:>15,} tokens {split.text_bytes:>15,} bytes"
        f" {len(split.shards):>6} shards"
        + (f" {split.documents:>10,} documents" if split.documents is not None else "")
        for name, split in index.splits.items()
    )


def main() -> int:
    """Prepare the data; 2 where the input, the output or an option cannot be used."""
    start = time.perf_counter()
    try:
        job = parse_arguments()
        with progress_bar() as track:
            index, written = prepare_bytes(job, track)
    except DataError as error:
        print(f"prepare_bytes: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # of the output: sources raise DataError
        print(
            f"prepare_bytes: {error}; make room or choose another --output, and start again",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("prepare_bytes: interrupted; start it again to finish", file=sys.stderr)
        return 130
    if not written:
        print(f"{job.output}: already prepared from this source, nothing to do")
    else:
        seconds = time.perf_counter() - start
        rate = sum(split.text_bytes for split in index.splits.values()) / seconds / 1e6
        print(f"{job.output}: prepared in {seconds:.1f} s ({rate:.0f} MB/s)")
    print(summary(index))
    return 0


if __name__ == "__main__":
    sys.exit(main())
