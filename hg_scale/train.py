"""Train a model: `deepspeed hg_scale/train.py --config configs/hg_1b.json`.

The command is the same under deepspeed, torchrun, srun, mpirun and plain python;
`slurm/train_64gpu.sh` is the job for a cluster. Started again with the same run folder, it resumes
from the last checkpoint. The exit codes are those of `exit_codes.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

# Run as a script, Python puts this folder first on sys.path, where its modules would shadow others.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent.resolve()]

from hg_scale.arguments import add_override_option, local_path, positive_int  # noqa: E402
from hg_scale.config import load_config  # noqa: E402
from hg_scale.config.layouts import elastic_line, load_elastic  # noqa: E402
from hg_scale.errors import UserError  # noqa: E402
from hg_scale.exit_codes import CONFIG_ERROR, DONE, FAILED, INTERRUPTED  # noqa: E402
from hg_scale.parallel.launch import Launch, LaunchError, affinity_problem  # noqa: E402
from hg_scale.standard_streams import protect_standard_streams  # noqa: E402
from hg_scale.training.interruption import StopSignals  # noqa: E402
from hg_scale.training.job_config import (  # noqa: E402
    describe_changes,
    is_requeued,
    job_copy,
    keep_config,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of training."""
    add = parser.add_argument
    add("--config", required=True, type=local_path, metavar="FILE",
        help="configuration file (configs/*.json)")  # fmt: skip
    add_override_option(parser)
    add("--run", type=local_path, metavar="DIR", dest="run_folder",
        help="run folder; training resumes if it has checkpoints "
        "(default: runs/<name of the configuration>)")  # fmt: skip
    add("--stop-at", type=positive_int, metavar="STEP",
        help="save a checkpoint after this step and exit; the schedule is unchanged")  # fmt: skip
    add("--profile", type=positive_int, metavar="STEP", help="write a profiler trace of this step")
    add("--dry-run", action="store_true",
        help="check the configuration, print layers, costs and stages, and exit")  # fmt: skip
    add("--check", action="store_true",
        help="check the configuration against the number of processes, the data, the last "
        "checkpoint and the free disk space, and exit")  # fmt: skip
    add("--world-size", type=positive_int, metavar="N",
        help="with --dry-run or --check: number of processes to plan for "
        "(default: the smallest possible)")  # fmt: skip
    add("--resolved", type=local_path, metavar="FILE",
        help="copy of the configuration of the job's first start, used if it exists; --check "
        "writes it (default in a requeued Slurm job: RUN/code/JOB/config.json)")  # fmt: skip
    add("--reread-config", action="store_true",
        help="in a requeued Slurm job, use --config as it is now")  # fmt: skip
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it


class BadRunFolder(UserError):
    """A run folder cannot have this name."""

    exit_code = CONFIG_ERROR


class Parser(argparse.ArgumentParser):
    """A parser that suggests --set to users who write `--section.key value`."""

    def error(self, message: str) -> NoReturn:
        unrecognized = message.partition("unrecognized arguments: ")[2]
        override = unrecognized.lstrip("-").replace(" ", "=", 1)
        is_key = "." in override.partition("=")[0]
        super().error(message + (f"; did you mean --set {override}?" if is_key else ""))


def run(options: argparse.Namespace) -> int:
    """Train, or check or plan a run, in a process that continues; return one of `exit_codes.py`."""
    signals = StopSignals()
    try:
        return _run(options, signals)
    finally:
        signals.restore()


def run_and_exit(options: argparse.Namespace) -> NoReturn:
    """As `run`, then exit: a signal or lost output in the last moments changes no exit code."""
    protect_standard_streams()
    signals = StopSignals()
    try:
        code = _run(options, signals)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception:
        traceback.print_exc()
        code = FAILED
    signals.ignore()
    exit_process(code)


def _run(options: argparse.Namespace, signals: StopSignals) -> int:
    folder = options.run_folder or Path("runs") / options.config.stem
    try:
        launch = Launch.from_environment()
    except LaunchError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    try:
        require_usable_name(folder)
        if options.dry_run:
            return dry_run(options, launch)
        if options.check:
            return check(options, folder, launch)
        path = use_job_config(options, folder, launch)
        config, layout = load_elastic(path, options.overrides, launch.world_size)
        if launch.on_one_node:  # on several, a rank that sees other files would exit alone
            from hg_scale.training.check import check_inputs

            check_inputs(config, folder, remote=False)
    except UserError as error:
        return launch.report(error)
    if layout and launch.rank == 0:
        print(elastic_line(config, layout, launch.world_size))
    if launch.local_rank == 0 and (problem := affinity_problem()):
        print(f"warning (rank {launch.rank}): {problem}", file=sys.stderr)
    signals.install(config.training.stop_signals)
    from hg_scale.training.run import train  # imports torch

    return train(
        config,
        folder,
        launch,
        signals=signals,
        stop_at=options.stop_at,
        profile=options.profile,
    )


def use_job_config(options: argparse.Namespace, folder: Path, launch: Launch) -> Path:
    """Return the configuration file to load: at a later start of a Slurm job the job's own copy.

    At the first start rank 0 writes the copy. Raises ConfigError or UserError.
    """
    copy = options.resolved or job_copy(folder)
    if copy is None:
        return options.config
    writes = launch.rank == 0 and (options.check or options.resolved is None)
    again = options.resolved is not None or is_requeued()
    rereads = options.reread_config and (options.check or options.resolved is None)
    if again and copy.is_file() and not rereads:
        if writes and (line := describe_changes(copy, options.config, options.overrides)):
            print(line)
        return copy
    if writes:
        keep_config(options.config, copy)
    return options.config


def require_usable_name(folder: Path) -> None:
    """Raise UserError if the file system refuses the run folder's name, or those of its files."""
    try:
        os.lstat(folder / "checkpoints" / ("x" * 128))  # longer than any name in a run folder
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise BadRunFolder(f"--run {folder}: {error.strerror}; choose another name") from None


def dry_run(options: argparse.Namespace, launch: Launch) -> int:
    """Print layers, costs, sharding and pipeline stages of a run, without importing torch."""
    world_size = options.world_size or (launch.world_size if launch.world_size > 1 else None)
    if world_size is None:
        config, layout = load_config(options.config, options.overrides), None
        world_size = config.parallel.tensor * config.parallel.pipeline
    else:
        config, layout = load_elastic(options.config, options.overrides, world_size)
    if launch.rank == 0:
        from rich.console import Console

        from hg_scale.training.dry_run import print_plan

        if layout:
            print(elastic_line(config, layout, world_size))
        width = None if sys.stdout.isatty() else 120  # a pipe has no width
        print_plan(config, world_size, Console(width=width))
    return DONE


def check(options: argparse.Namespace, folder: Path, launch: Launch) -> int:
    """Report within a second what would stop the run later, without importing torch."""
    from hg_scale.training.check import check_run
    from hg_scale.training.run_lock import describe_living_run

    world_size = options.world_size or launch.world_size
    if refusal := describe_living_run(folder):
        print(f"refused: {refusal}")  # to stdout, which `slurm/common.sh` reads
        return FAILED
    path = use_job_config(options, folder, launch)
    lines = check_run(path, options.overrides, folder, world_size, options.stop_at)
    if launch.rank == 0:
        print("\n".join(lines))
    return DONE


def exit_process(code: int) -> NoReturn:
    """Exit with `code`; skip the interpreter's shutdown while a process group is still open.

    The destructors of a process group wait for ranks that may be lost, or abort.
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
    run_and_exit(parser.parse_args())
