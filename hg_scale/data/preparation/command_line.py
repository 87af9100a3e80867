"""What the command lines of data_prep/ share."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from hg_scale.data.errors import DataError
from hg_scale.data.index import SPLITS, Index
from hg_scale.data.preparation.place import Place
from hg_scale.data.preparation.team import TeamStopped
from hg_scale.data.progress import ProgressBar

_GRACE = 3.0  # seconds that the others get to end by themselves before MPI ends them


def parser_of(script_docstring: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with what the script says of itself."""
    return argparse.ArgumentParser(
        description=script_docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_file_options(parser: argparse.ArgumentParser) -> None:
    """--include and --exclude."""
    add = parser.add_argument
    add("--include", action="append", metavar="GLOB", help="take these files of a folder only, by "
        "name or relative path, repeatable (default: all)")  # fmt: skip
    add("--exclude", action="append", default=[], metavar="GLOB", help="leave these files of a "
        "folder out, repeatable")  # fmt: skip


def add_format_options(parser: argparse.ArgumentParser) -> None:
    """--field and --document-separator."""
    add = parser.add_argument
    add("--field", default="text", metavar="NAME", help="that holds the text in JSON lines and "
        "parquet (default: text)")  # fmt: skip
    add("--document-separator", type=separator, metavar="TEXT", help="stands between the documents "
        r"of plain text, \n and \t are understood; it is not kept (default: a file is a "
        "document)")  # fmt: skip


def add_shard_options(parser: argparse.ArgumentParser, *, chunk: int | None) -> None:
    """--chunk-tokens and --shard-tokens."""
    add = parser.add_argument
    add(
        "--chunk-tokens",
        type=positive,
        default=chunk,
        metavar="N",
        help="tokens of a tar member (default: " + (f"{chunk})" if chunk else "about 65536)"),
    )
    add("--shard-tokens", type=positive, metavar="N",
        help="tokens of a shard (default: equal shards of about 1 Mi tokens, 16 at least; larger "
        "ones, up to 64 Mi, past 256 of them)")  # fmt: skip


def add_team_options(parser: argparse.ArgumentParser) -> None:
    """--patience."""
    parser.add_argument("--patience", type=positive, default=120, metavar="SECONDS",
        help="with several processes: take one for dead that is silent for so long (default: "
        "%(default)s)")  # fmt: skip


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
    if len(parts) != len(SPLITS) or not (min(parts) >= 0 and abs(sum(parts) - 1) < 1e-6):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected three fractions that add up to 1, or three numbers of bytes"
        )
    return parts


def parse_split_or_folders(text: str) -> tuple[float, ...] | tuple[int, ...] | None:
    """The same, or None for `folders`."""
    return None if text == "folders" else parse_split(text)


def separator(text: str) -> bytes:
    r"""A separator as typed, with \n and the like."""
    value = text.encode("latin-1", "backslashreplace").decode("unicode_escape").encode()
    if not value:
        raise argparse.ArgumentTypeError("is empty")
    return value


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def seed(text: str) -> int:
    """A whole number of 64 bits."""
    with suppress(ValueError):
        if -(1 << 63) <= (value := int(text)) < 1 << 63:
            return value
    raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at most 63 bits")


def run(name: str, work: Callable[[ProgressBar], None], place: Place | None = None) -> int:
    """Do the work with progress shown; an exit code, after a line on stderr where it failed."""
    place = place or Place()
    who = f"{name}: {place}: " if place.size > 1 else f"{name}: "
    try:
        with ProgressBar(sys.stderr if place.rank == 0 else None) as progress:
            work(progress)
        sys.stdout.flush()  # here, where it is known what a reader who has left means
        return 0
    except TeamStopped as error:
        print(f"{who}stopped: {error}", file=sys.stderr, flush=True)
        code = 2
    except DataError as error:
        print(f"{who}{error}", file=sys.stderr, flush=True)
        code = 2
    except BrokenPipeError:  # all is done, and who was to read of it has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # of the output: sources raise DataError
        print(
            f"{who}{error}; {_remedy(error)}, and start again",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        code = 2
    except MemoryError as error:
        print(
            f"{who}there is not enough memory ({error}); take fewer --chunk-tokens, --shard-tokens "
            "or processes on a machine, and start again",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        code = 2
    except KeyboardInterrupt:
        print(f"{who}interrupted; start it again to finish", file=sys.stderr, flush=True)
        code = 130
    if place.world is not None:
        time.sleep(_GRACE)
        place.world.Abort(code)
    return code


def _remedy(error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "make room or choose another --output" if full else "choose another --output"


def report(output: Path, index: Index, written: bool, seconds: float) -> None:
    """What was made: a line, then a line a split."""
    if written:
        rate = sum(split.text_bytes for split in index.splits.values()) / seconds / 1e6
        print(f"{output}: prepared in {seconds:.1f} s ({rate:.0f} MB/s)")
    else:
        print(f"{output}: already prepared from this source, nothing to do")
    print(summary(index))
    asked = index.source.get("split")
    for number, name in enumerate(SPLITS):
        wanted = asked[number] if isinstance(asked, list | tuple) else name != "test"
        if wanted and not index.splits[name].tokens:
            print(f"  nothing fell into {name}: give it a larger part with --split, or more text")


def summary(index: Index) -> str:
    """A line a split."""
    return "\n".join(
        f"  {name:<10} {split.tokens:>15,} tokens {split.text_bytes:>15,} bytes"
        f" {len(split.shards):>6} shards"
        + (f" {split.documents:>10,} documents" if split.documents is not None else "")
        for name, split in index.splits.items()
    )


def patterns(include: Sequence[str] | None, exclude: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """--include and --exclude as they are used."""
    return {"include": tuple(include or ("*",)), "exclude": tuple(exclude)}
