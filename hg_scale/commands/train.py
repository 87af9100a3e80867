"""Train a model in this process; under a launcher use `hg_scale/train.py` instead."""

from __future__ import annotations

import argparse

from hg_scale import train

HELP = "train a model (under a launcher: deepspeed hg_scale/train.py ...)"


def add_options(parser: argparse.ArgumentParser) -> None:
    train.add_options(parser)


def run(options: argparse.Namespace) -> int:
    train.run_and_exit(options)
