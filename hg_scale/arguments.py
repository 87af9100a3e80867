"""Types and options shared by the command lines of training, `hg-scale` and data_prep/."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

_URL = re.compile(
    r"[a-z][a-z0-9+.-]+://|(file|s3a?|gs|gcs|hf|https?|ftp|hdfs|abfss?|az|ssh):/", re.IGNORECASE
)


def local_path(text: str) -> Path:
    """Parse the path of a local file or folder, as an argparse `type`; URLs are refused.

    `Path` would turn `s3://bucket/corpus` into a folder named `s3:`.
    """
    if not _URL.match(text):
        return Path(text)
    remedy = "copy from or to it with a tool such as `aws s3 cp` or `hf download`, or mount it"
    if text.lower().startswith("file:"):
        remedy = "leave out file:"
    raise argparse.ArgumentTypeError(f"{text!r} is a URL; expected a local path: {remedy}")


def positive_int(text: str) -> int:
    """Parse an integer above 0, as an argparse `type`."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer above 0")
    return int(text)


def non_negative_int(text: str) -> int:
    """Parse an integer of 0 or above, as an argparse `type`."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer, 0 or above")
    return int(text)


def add_override_option(parser: argparse.ArgumentParser) -> None:
    """Add --set KEY=VALUE, which overrides a key of the configuration."""
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
        help="override a key, as in model.d_model=256; repeatable",
    )  # fmt: skip


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the trained model to read (positional) and --precision."""
    parser.add_argument(
        "model", type=local_path, metavar="RUN_OR_CHECKPOINT_OR_EXPORT",
        help="a run folder (its newest checkpoint), a checkpoint folder, or an export",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32",
        help="precision of weights and activations (default: fp32)",
    )  # fmt: skip
