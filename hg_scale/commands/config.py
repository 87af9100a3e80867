"""Print a configuration file with everything it extends filled in."""

from __future__ import annotations

import argparse
import sys

from hg_scale.arguments import add_override_option, local_path
from hg_scale.config import ConfigError, load_config

HELP = "check a configuration file and print it with everything it extends filled in"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=local_path, metavar="FILE")
    add_override_option(parser)


def run(options: argparse.Namespace) -> int:
    try:
        config = load_config(options.file, options.overrides)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(config.model_dump_json(indent=2))
    return 0
