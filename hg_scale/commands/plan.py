"""`hg-scale plan --flat-control FILE`: the flat configuration of equal training FLOPs."""

from __future__ import annotations

import argparse
import sys

from hg_scale.arguments import add_override_option, local_path
from hg_scale.atomic_write import write_atomic
from hg_scale.config import ConfigError, load_config
from hg_scale.errors import UserError

HELP = "make the flat configuration that a hierarchical one has to beat at equal training FLOPs"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--flat-control", type=local_path, required=True, metavar="FILE",
                        help="the hierarchical configuration")  # fmt: skip
    parser.add_argument("--write", type=local_path, metavar="FILE",
                        help="write it as a configuration that extends the given one")  # fmt: skip
    add_override_option(parser)


def run(options: argparse.Namespace) -> int:
    from hg_scale.planning.flat_control import control_file, flat_control

    if options.write and options.overrides:
        raise UserError(
            "--write: the file extends --flat-control, which lacks the values of --set; put them "
            "into a configuration that extends it, and give that one"
        )
    try:
        control = flat_control(load_config(options.flat_control, options.overrides))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"{control.flops_per_token:.4g} training FLOPs per token, {control.difference:+.2%} "
        f"against {control.hierarchical_flops_per_token:.4g}\n{control.rule}\n{control.window}"
    )
    if options.write:
        content = control_file(control, options.flat_control, options.write)
        write_atomic(options.write, content.encode())
        print(f"written: {options.write}")
    return 0
