"""Train a model: `deepspeed hg_scale/train.py --config configs/hg_1b.json`.

Starts alike under deepspeed, torchrun, srun, mpirun and plain python; `slurm/train_64gpu.sh` is
the job for a cluster. Run it again with the same run folder and it goes on from the last
checkpoint. Its exit code says what to do next: see `exit_codes.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

# Run as a file, this folder itself comes first on the path and would shadow other libraries.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent.resolve()]

from hg_scale.config import load_config  # noqa: E402
from hg_scale.config.layouts import elastic_line, load_elastic  # noqa: E402
from hg_scale.errors import UserError  # noqa: E402
from hg_scale.exit_codes import DONE, FAILED  # noqa: E402
from hg_scale.parallel.launch import Launch, LaunchError, affinity_problem  # noqa: E402
from hg_scale.training.interruption import StopSignals  # noqa: E402


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of training."""
    add = parser.add_argument
    add("--config", required=True, type=Path, metavar="FILE", help="configs/*.json")
    add("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
        help="override a key, as in model.d_model=256; repeatable")  # fmt: skip
    add("--run", type=Path, metavar="DIR", dest="run_folder",
        help="run folder; resumed if it has checkpoints (default: runs/<config>)")  # fmt: skip
    add("--stop-at", type=positive, metavar="STEP",
        help="save and end cleanly after this step, the schedule unchanged")  # fmt: skip
    add("--profile", type=positive, metavar="STEP", help="write a profiler trace of this step")
    add("--dry-run", action="store_true",
        help="check the configuration, print layers, costs and stages, and end")  # fmt: skip
    add("--check", action="store_true",
        help="check the configuration against the processes, the shards, the last checkpoint and "
        "the disk, and end")  # fmt: skip
    add("--world-size", type=positive, metavar="N",
        help="with --dry-run or --check: processes to plan for (default: the fewest)")  # fmt: skip
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher injects it


class Parser(argparse.ArgumentParser):
    """Tells those who set keys the way of other programs how it is done here."""

    def error(self, message: str) -> NoReturn:
        words = message.partition("unrecognized arguments: ")[2]
        key = words.lstrip("-").replace(" ", "=", 1)
        hint = f"; did you mean --set {key}?" if "." in key.partition("=")[0] else ""
        super().error(message + hint)


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Returns one of `exit_codes.py`."""
    folder = options.run_folder or Path("runs") / options.config.stem
    try:
        launch = Launch.from_environment()
    except LaunchError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    try:
        if options.dry_run:
            return dry_run(options, launch)
        if options.check:
            return check(options, folder, launch)
        config, layout = load_elastic(options.config, options.overrides, launch.world_size)
        if launch.on_one_node:  # else a rank that sees other files would leave alone
            from hg_scale.training.check import check_inputs

            check_inputs(config, folder, remote=False)
    except UserError as error:
        return launch.report(error)
    if layout and launch.rank == 0:
        print(elastic_line(config, layout, launch.world_size))
    if launch.local_rank == 0 and (problem := affinity_problem()):
        print(f"warning (rank {launch.rank}): {problem}", file=sys.stderr)
    with StopSignals(config.training.stop_signals) as signals:
        from hg_scale.training.run import train  # imports torch

        return train(
            config,
            folder,
            launch,
            signals=signals,
            stop_at=options.stop_at,
            profile=options.profile,
        )


def dry_run(options: argparse.Namespace, launch: Launch) -> int:
    """Print the plan of the run; torch is not imported."""
    known = options.world_size or (launch.world_size if launch.world_size > 1 else None)
    if known is None:
        config, layout = load_config(options.config, options.overrides), None
        known = config.parallel.tensor * config.parallel.pipeline
    else:
        config, layout = load_elastic(options.config, options.overrides, known)
    if launch.rank == 0:
        from rich.console import Console

        from hg_scale.training.dry_run import print_plan

        if layout:
            print(elastic_line(config, layout, known))
        width = None if sys.stdout.isatty() else 120  # a pipe has no width of its own
        print_plan(config, known, Console(width=width))
    return DONE


def check(options: argparse.Namespace, folder: Path, launch: Launch) -> int:
    """Say in a second what would stop the run later; torch is not imported."""
    from hg_scale.training.check import check_run

    known = options.world_size or launch.world_size
    lines = check_run(options.config, options.overrides, folder, known, options.stop_at)
    if launch.rank == 0:
        print("\n".join(lines))
    return DONE


def leave(code: int) -> NoReturn:
    """End this process, at once where it still is in a process group.

    Its end there would wait for ranks that are gone, or abort.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    parser = Parser(prog="train.py", description=__doc__.split("\n")[0])
    add_options(parser)
    try:
        exit_code = run(parser.parse_args())
    except KeyboardInterrupt:
        exit_code = FAILED
    except Exception:
        traceback.print_exc()
        exit_code = FAILED
    leave(exit_code)
