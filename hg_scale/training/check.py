"""Checks before a run, in about a second and without a GPU: `train.py --check`.

`slurm/common.sh` runs them at the start of an allocation: the configuration against the number of
processes, the shards, the last checkpoint and the free disk space. Imports no torch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from hg_scale.checkpoint.find import checkpoints_in, find_latest, verify_sizes
from hg_scale.checkpoint.manifest import read_manifest
from hg_scale.config import ConfigError, load_config
from hg_scale.config.errors import Problem
from hg_scale.config.layouts import (
    elastic_line,
    fitting_layouts,
    largest_fitting,
    load_elastic,
)
from hg_scale.config.schema import Config
from hg_scale.data.errors import DataError
from hg_scale.data.index import Index, is_local
from hg_scale.data.sequence_schedule import DataSource
from hg_scale.errors import UserError
from hg_scale.model.costs import parameter_count
from hg_scale.training.corpora import open_sources
from hg_scale.training.resume import find_start_checkpoint, refuse_other_model

STATE_BYTES = 12  # per parameter in a checkpoint: fp32 weight and two moments


class DiskError(UserError):
    """The run folder is not writable, or its disk would be full before the run ends."""


def check_run(
    path: Path,
    overrides: Sequence[str],
    folder: Path,
    world_size: int,
    stop_at: int | None = None,
) -> list[str]:
    """Check that a run of `world_size` processes in `folder` can start; return lines to print.

    The last line begins with the number of processes to start, which `slurm/common.sh` reads.
    Raises ConfigError, DataError, CheckpointError or DiskError if the run cannot start.
    """
    notes: list[str] = []
    try:
        config, layout = load_elastic(path, overrides, world_size, fewer=True)
    except ConfigError as error:
        raise _with_advice(error, path, overrides, world_size) from None
    sources = check_inputs(config, folder, remote=True)
    shards = sum(check_shards(source) for source in sources)
    if layout:
        notes.append(elastic_line(config, layout, world_size))
        world_size = layout.world_size
    checkpoint = check_checkpoint(config, folder, notes.append)
    check_disk(config, folder, checkpoint, stop_at)
    parallel = config.parallel
    start = f"resumes from {checkpoint}" if checkpoint else "starts from scratch"
    return [
        *notes,
        f"{world_size} processes = tensor {parallel.tensor} x pipeline {parallel.pipeline} x data "
        f"{config.data_parallel(world_size)}; {shards} shards; {start}",
    ]


def check_inputs(config: Config, folder: Path, *, remote: bool) -> list[DataSource]:
    """Check the corpora, `checkpoint.start_from` and packages of a run; return the open corpora.

    remote: open corpora behind URLs and pipes, too. `start_from` is checked only for a run without
    checkpoints; its own are verified once the run has locked its folder. Raises ConfigError that
    lists all problems.
    """
    problems: list[Problem] = []
    sources: list[DataSource] = []
    try:
        sources = open_sources(config, remote=remote)
    except ConfigError as error:
        problems += error.problems
    try:
        if not any((folder / "checkpoints").glob("step-*")):
            find_start_checkpoint(config)
    except ConfigError as error:
        problems += error.problems
    if config.logging.tensorboard and find_spec("tensorboard") is None:
        advice = "the package tensorboard is not installed: pip install 'hg-scale[tensorboard]'"
        problems.append(Problem("logging.tensorboard", advice))
    if problems:
        raise ConfigError(problems)
    return sources


def _with_advice(
    error: ConfigError, path: Path, overrides: Sequence[str], world_size: int
) -> ConfigError:
    """Add layouts that fit to the error, if only the number of processes is wrong."""
    try:
        config = load_config(path, overrides)
    except ConfigError:
        return error
    advice = []
    for layout in fitting_layouts(config, world_size)[:3]:
        advice.append(f"all {world_size} processes, the same batch: {layout.options()}")
    smaller = largest_fitting(config, world_size)
    if smaller and smaller.world_size < world_size:
        start = f"{smaller.world_size} of the {world_size} processes, the same batch"
        advice.append(f"{start}: {smaller.options()}")
    return ConfigError(error.problems, str(path), advice)


def check_shards(source: DataSource) -> int:
    """Count the shards; raise DataError for the first that is missing or truncated.

    Compares names and sizes only, and only of local shards.
    """
    count = 0
    for file, size in _shard_files(source.index):
        count += 1
        if not is_local(file):
            continue
        try:
            found = Path(file).stat().st_size
        except OSError as error:
            raise DataError(
                f"{file}: {error.strerror}; copy the shard again or prepare the data again"
            ) from None
        if found != size:
            raise DataError(
                f"{file}: {found} bytes, expected {size}; copy the shard again or prepare the data "
                "again"
            )
    return count


def _shard_files(index: Index) -> Iterator[tuple[str, int]]:
    """The shards that a run reads and their sizes; the validation split is optional."""
    validation = index.splits.get("validation")
    for shard in [*index.split("train").shards, *(validation.shards if validation else [])]:
        yield index.url(shard), shard.file_bytes


def check_checkpoint(config: Config, folder: Path, report: Callable[[str], None]) -> Path | None:
    """Return the checkpoint that the run would resume or start from, or None.

    Raises CheckpointError if all of the run's checkpoints are incomplete, ConfigError if the
    checkpoint holds another model or `checkpoint.start_from` is not usable.
    """
    checkpoint = find_latest(folder / "checkpoints", report=report)
    if checkpoint is None:
        return find_start_checkpoint(config, report)
    refuse_other_model(config, checkpoint)
    return checkpoint


def check_disk(
    config: Config, folder: Path, checkpoint: Path | None, stop_at: int | None = None
) -> None:
    """Raise DiskError if the folder is not writable or the checkpoints to come do not fit.

    checkpoint: where the run starts; its size is the estimate for the others.
    """
    existing = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path)
    )
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        what = "no write permission" if existing.is_dir() else "not a folder"
        raise DiskError(f"{folder}: cannot be written ({existing}: {what}); choose another --run")
    step = size = 0
    if checkpoint:
        manifest = read_manifest(checkpoint)
        step = manifest["step"]
        size = sum(file["bytes"] for file in manifest["files"])
    size = size or STATE_BYTES * parameter_count(config.model)
    old = _count_superseded(folder / "checkpoints", step, config.checkpoint.keep_every)
    count = checkpoints_to_come(config, step, stop_at, old)
    try:
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise DiskError(f"{existing}: {error.strerror}; choose another --run") from None
    if count * size > free:
        raise DiskError(
            f"{folder}: {count} checkpoints to come need {count * size / 1e9:,.3g} GB "
            f"({size / 1e9:,.3g} GB each), but only {free / 1e9:,.3g} GB are free (room for "
            f"{free // size}); free disk space, raise checkpoint.every, or choose another --run"
        )


def checkpoints_to_come(config: Config, done: int, stop_at: int | None = None, old: int = 0) -> int:
    """Return how many more checkpoints than now the disk must hold after step `done`, at most.

    old: existing checkpoints that `checkpoint.keep_last` deletes as newer ones are written.
    """
    last, every = config.training.steps, config.checkpoint.every
    last = last if stop_at is None else min(last, stop_at)
    if done >= last:
        return 0
    count = (last // every - done // every + bool(last % every)) if every else 1
    keep = config.checkpoint.keep_last
    if not keep:
        return count
    keep_every = config.checkpoint.keep_every
    # Plus one: the oldest is deleted after the newest has been written.
    rolling = max(1, keep + 1 - old)
    return min(count, rolling + (last // keep_every - done // keep_every if keep_every else 0))


def _count_superseded(checkpoints: Path, done: int, keep_every: int) -> int:
    """Count the complete checkpoints up to step `done` that `keep_last` will delete."""
    if not checkpoints.is_dir():
        return 0
    return sum(
        step <= done and not (keep_every and step % keep_every == 0) and verify_sizes(path) is None
        for step, path in checkpoints_in(checkpoints).items()
    )
