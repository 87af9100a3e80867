"""`hg-scale VERB`: dispatch to the module of the verb.

Each verb is a module of this package with `HELP` (one line), `add_options(parser)` and
`run(options) -> exit code`. Heavy imports are inside `run`, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence

from hg_scale import __version__
from hg_scale.errors import UserError
from hg_scale.standard_streams import open_missing_streams, protect_stderr

_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)  # of stdout itself

VERBS = (
    "train",
    "config",
    "plan",
    "data",
    "convert",
    "evaluate",
    "generate",
    "harness",
    "report",
    "summary",
    "status",
    "doctor",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb and return its exit code.

    1: stdout cannot be written, 2: invalid usage or configuration, 130: interrupted, 141: stdout
    was closed (`| head`).
    """
    open_missing_streams()
    protect_stderr()
    parser = argparse.ArgumentParser(
        prog="hg-scale",
        description="Train hierarchical (Hourglass) Transformer language models.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS:
        module = importlib.import_module(f"hg_scale.commands.{name}")
        verb = verbs.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_options(verb)
        verb.set_defaults(run_verb=module.run)
    command = "hg-scale"
    try:
        try:
            options = parser.parse_args(arguments)
            command += f" {options.verb}"
            return options.run_verb(options)
        finally:
            sys.stdout.flush()  # also the text of --help; here its errors are caught
    except UserError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # stdout was closed, as by `| head`
        _drop_output()
        return 141
    except OSError as error:
        if error.filename is not None:
            print(f"{command}: {error.filename}: {error.strerror}", file=sys.stderr)
            return 2
        if error.errno not in _UNWRITABLE:
            raise
        _drop_output()
        print(f"{command}: stdout cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    except UnicodeEncodeError as error:  # an argument with bytes that are no text
        text = repr(error.object[error.start : error.end])
        print(f"{command}: a name is not UTF-8 ({text}); rename it", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return 130


def _drop_output() -> None:
    """Drop what is still buffered for stdout, which the interpreter would flush at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
