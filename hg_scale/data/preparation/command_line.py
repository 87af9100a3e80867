"""Options, exit codes and reports that the scripts of data_prep/ share."""

from __future__ import annotations

import argparse
import errno
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from hg_scale.arguments import local_path, non_negative_int, positive_int
from hg_scale.data.errors import DataError
from hg_scale.data.index import SPLITS, Index
from hg_scale.data.preparation.rank_group import OtherRankFailed
from hg_scale.data.preparation.skipping import (
    MAX_SKIPPED,
    SKIPPED_FILE,
    SkipLog,
    SkippingRefused,
    SkipPolicy,
    TooManySkipped,
)
from hg_scale.data.progress import ProgressBar
from hg_scale.parallel.launch import Launch, LaunchError
from hg_scale.standard_streams import protect_standard_streams

_EXIT_DELAY = 3.0  # seconds in which the other ranks report their error
_SMALLER = "use fewer --chunk-tokens, --shard-tokens or processes per machine"


def make_parser(script_docstring: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help begins with the script's docstring.

    From now on, the work continues where its output has no reader any more.
    """
    protect_standard_streams()
    return argparse.ArgumentParser(
        description=script_docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_input_and_output(parser: argparse.ArgumentParser, *, several: bool = True) -> None:
    """Add --input, of one or `several` paths, and --output, a folder."""
    add = parser.add_argument
    add("--input", type=local_path, required=True, nargs="+" if several else None, metavar="PATH",
        help="files and folders" if several else "text file or folder of files")  # fmt: skip
    add("--output", type=local_path, required=True, metavar="DIR",
        help="folder to write, new or empty")  # fmt: skip


def add_file_options(parser: argparse.ArgumentParser) -> None:
    """Add --include and --exclude."""
    add = parser.add_argument
    add("--include", action="append", metavar="GLOB", help="read only these files of a folder, by "
        "name or relative path, repeatable (default: all)")  # fmt: skip
    add("--exclude", action="append", default=[], metavar="GLOB", help="leave out these files of a "
        "folder, repeatable")  # fmt: skip


def add_format_options(parser: argparse.ArgumentParser) -> None:
    """Add --field and --document-separator."""
    add = parser.add_argument
    add("--field", default="text", metavar="NAME", help="field or column with the text in "
        "JSON lines, Parquet, Arrow, CSV and TSV; a.b: b inside a (default: text)")  # fmt: skip
    add("--document-separator", type=parse_separator, metavar="TEXT", help="separates the "
        r"documents of plain text, may contain \n and \t; it is not kept (default: a file is a "
        "document)")  # fmt: skip


def add_as_they_are_option(parser: argparse.ArgumentParser) -> None:
    """Add --bytes-as-they-are."""
    parser.add_argument("--bytes-as-they-are", action="store_true", dest="as_they_are",
        help="read files of every kind, also binary ones, without decompressing them: their "
        "stored bytes are the text")  # fmt: skip


def add_shard_options(parser: argparse.ArgumentParser, *, chunk: int | None) -> None:
    """Add --chunk-tokens and --shard-tokens."""
    add = parser.add_argument
    add(
        "--chunk-tokens",
        type=positive_int,
        default=chunk,
        metavar="N",
        help="tokens per tar member (default: " + (f"{chunk})" if chunk else "about 65536)"),
    )
    add("--shard-tokens", type=positive_int, metavar="N",
        help="tokens per shard (default: at least 16 equal shards of about 1 Mi tokens; from 256 "
        "shards on larger ones, up to 64 Mi)")  # fmt: skip


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """Add --patience."""
    parser.add_argument("--patience", type=positive_int, default=120, metavar="SECONDS",
        help="with several processes: after so long without a sign of life a process is taken for "
        "dead (default: %(default)s)")  # fmt: skip


def add_skip_options(parser: argparse.ArgumentParser) -> None:
    """Add --on-fault and --max-skipped."""
    add = parser.add_argument
    add("--on-fault", choices=("stop", "skip"), default="stop", help="what to do about a line, "
        "document, image or file that cannot be read: stop, or leave it out and list it in "
        f"{SKIPPED_FILE} (default: stop)")  # fmt: skip
    add("--max-skipped", type=non_negative_int, default=MAX_SKIPPED, metavar="N",
        help="with --on-fault skip: stop if more than N items cannot be read "
        "(default: %(default)s)")  # fmt: skip


def skip_policy(options: argparse.Namespace) -> SkipPolicy:
    """Return --on-fault and --max-skipped."""
    return SkipPolicy(options.on_fault, options.max_skipped)


def find_launch(parser: argparse.ArgumentParser) -> Launch:
    """Return this process's rank; exits 2 where the launcher's variables make no sense."""
    try:
        return Launch.from_environment()
    except LaunchError as error:
        parser.error(str(error))


def parse_split(text: str) -> tuple[float, ...] | tuple[int, ...]:
    """Parse three byte counts or three fractions that add up to 1."""
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
    """Parse the same, or `folders`, which is None."""
    return None if text == "folders" else parse_split(text)


def parse_separator(text: str) -> bytes:
    r"""Parse a separator as typed, with \n and the like."""
    value = text.encode("latin-1", "backslashreplace").decode("unicode_escape").encode()
    if not value:
        raise argparse.ArgumentTypeError("is empty")
    return value


def parse_seed(text: str) -> int:
    """Parse a signed integer of 64 bits."""
    with suppress(ValueError):
        if -(1 << 63) <= (value := int(text)) < 1 << 63:
            return value
    raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at most 63 bits")


def run_preparation(
    name: str, work: Callable[[ProgressBar], None], launch: Launch | None = None
) -> int:
    """Run the work and show its progress. Returns an exit code, after a line on stderr for errors.

    Ranks that fail wait until all have reported: the launcher kills the others at the first exit.
    """
    launch = launch or Launch()
    try:
        with ProgressBar(sys.stderr if launch.rank == 0 else None) as progress:
            work(progress)
        return 0
    except OtherRankFailed as error:
        code, message = 2, f"stopped: {error}"
    except DataError as error:
        code, message = 2, str(error)
        if isinstance(error, SkippingRefused) and not isinstance(error, TooManySkipped):
            message += " (--on-fault skip leaves out what cannot be read)"
    except OSError as error:  # of the output: sources raise DataError
        code, message = 2, f"{error}; {_remedy(error)}, and start again"
    except MemoryError as error:
        code, message = 2, f"out of memory ({error}); {_SMALLER}, and start again"
    except KeyboardInterrupt:
        code, message = 130, "interrupted; start it again to finish"
    who = f"{name}: {launch}" if launch.world_size > 1 else name
    print(f"{who}: {message}", file=sys.stderr, flush=True)
    if launch.world_size > 1:
        time.sleep(_EXIT_DELAY)
    return code


def _remedy(error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "free some space or choose another --output" if full else "choose another --output"


def report(
    output: Path, index: Index, written: bool, seconds: float, log: SkipLog, remarks: Iterable[str]
) -> None:
    """Print what was written: a line, a line per split, and what was left out."""
    if written:
        rate = sum(split.text_bytes for split in index.splits.values()) / seconds / 1e6
        print(f"{output}: prepared in {seconds:.1f} s ({rate:.0f} MB/s)")
    else:
        print(f"{output}: already prepared from this source, nothing to do")
    print(_summary(index))
    sizes = index.source.get("split")
    for number, name in enumerate(SPLITS):
        expected = sizes[number] if isinstance(sizes, list | tuple) else name != "test"
        if expected and not index.splits[name].tokens:
            print(f"  {name} is empty: increase its part with --split, or add text")
    for line in (*remarks, *log.report(output / SKIPPED_FILE)):
        print(line)


def _summary(index: Index) -> str:
    """Return a line per split."""
    return "\n".join(
        f"  {name:<10} {split.tokens:>15,} tokens {split.text_bytes:>15,} bytes"
        f" {len(split.shards):>6} shards"
        + (f" {split.documents:>10,} documents" if split.documents is not None else "")
        for name, split in index.splits.items()
    )


def patterns(include: Sequence[str] | None, exclude: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return --include and --exclude as keyword arguments of a corpus."""
    return {"include": tuple(include or ("*",)), "exclude": tuple(exclude)}
