"""What would make a run fail later, found in a second, before any GPU is touched.

`train.py --check` runs it from `slurm/common.sh` once an allocation stands: the configuration
against the number of processes, the shards, the last checkpoint, the disk. It imports no torch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
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
from hg_scale.data.schedule import DataSource
from hg_scale.errors import UserError
from hg_scale.model.costs import parameter_count
from hg_scale.training.corpora import open_sources
from hg_scale.training.resume import find_start_checkpoint, refuse_other_model

STATE_BYTES = 12  # a parameter in a checkpoint: fp32 weight and two moments


class DiskError(UserError):
    """The run folder cannot be written to, or will be full before the end."""


def check_run(
    path: Path,
    overrides: Sequence[str],
    folder: Path,
    world_size: int,
    stop_at: int | None = None,
) -> list[str]:
    """Lines about a run of `world_size` processes in `folder` that can start.

    Raises ConfigError, DataError, CheckpointError or DiskError, told in lines, where it cannot.
    The last line begins with the number of processes to start: `slurm/common.sh` reads it.
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
    begin = f"goes on from {checkpoint}" if checkpoint else "begins anew"
    return [
        *notes,
        f"{world_size} processes = tensor {parallel.tensor} x pipeline {parallel.pipeline} x data "
        f"{config.data_parallel(world_size)}; {shards} shards; {begin}",
    ]


def check_inputs(config: Config, folder: Path, *, remote: bool) -> list[DataSource]:
    """The corpora of a run, which it may read, and `checkpoint.start_from`, if it needs that.

    Raises ConfigError listing all that is wrong with them; not `remote`: with what is a path. What
    the run folder holds is left to the run that has locked it.
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
    if problems:
        raise ConfigError(problems)
    return sources


def _with_advice(
    error: ConfigError, path: Path, overrides: Sequence[str], world_size: int
) -> ConfigError:
    """The error, and where only the number of processes is at fault, what would fit that."""
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
    """How many shards there are; raises DataError at the first that is missing or cut short.

    Names and sizes only. Behind a URL or a pipe none is looked at.
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
    """Of what a run reads: a training split there has to be, and a validation split may be."""
    held_out = index.splits.get("validation")
    for shard in [*index.split("train").shards, *(held_out.shards if held_out else [])]:
        yield index.url(shard), shard.file_bytes


def check_checkpoint(config: Config, folder: Path, report: Callable[[str], None]) -> Path | None:
    """What the run would begin from. CheckpointError or ConfigError: damaged, or another model."""
    checkpoint = find_latest(folder / "checkpoints", report=report)
    if checkpoint is None:
        return find_start_checkpoint(config, report)
    refuse_other_model(config, checkpoint)
    return checkpoint


def check_disk(
    config: Config, folder: Path, checkpoint: Path | None, stop_at: int | None = None
) -> None:
    """Raises DiskError where the checkpoints to come cannot be written, or do not fit there."""
    here = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(p))
    if not (here.is_dir() and os.access(here, os.W_OK | os.X_OK)):
        what = "no write permission" if here.is_dir() else "not a folder"
        raise DiskError(f"{folder}: cannot be written ({here}: {what}); choose another --run")
    done = size = 0
    if checkpoint:
        manifest = read_manifest(checkpoint)
        done = manifest["step"]
        size = sum(file["bytes"] for file in manifest["files"])
    size = size or STATE_BYTES * parameter_count(config.model)
    old = _superseded_later(folder / "checkpoints", done, config.checkpoint.keep_every)
    count = checkpoints_to_come(config, done, stop_at, old)
    try:
        free = shutil.disk_usage(here).free
    except OSError as error:
        raise DiskError(f"{here}: {error.strerror}; choose another --run") from None
    if count * size > free:
        fits = free // size
        raise DiskError(
            f"{folder}: {count} checkpoints to come of {size / 1e9:,.3g} GB each take "
            f"{count * size / 1e9:,.3g} GB, {free / 1e9:,.3g} GB are free there (room for {fits}); "
            "make room, raise checkpoint.every, or choose another --run"
        )


def checkpoints_to_come(config: Config, done: int, stop_at: int | None = None, old: int = 0) -> int:
    """The most checkpoints that will stand on the disk beside those of `done` steps.

    With `checkpoint.keep_last`, `old` of those make room for newer ones.
    """
    last, every = config.training.steps, config.checkpoint.every
    last = last if stop_at is None else min(last, stop_at)
    if done >= last:
        return 0
    count = (last // every - done // every + bool(last % every)) if every else 1
    keep = config.checkpoint.keep_last
    if not keep:
        return count
    kept = config.checkpoint.keep_every
    # One more while the newest is being written and the oldest still stands.
    places = max(1, keep + 1 - old)
    return min(count, places + (last // kept - done // kept if kept else 0))


def _superseded_later(checkpoints: Path, done: int, keep_every: int) -> int:
    """How many of the whole checkpoints up to step `done` newer ones will take the place of."""
    if not checkpoints.is_dir():
        return 0
    return sum(
        step <= done and not (keep_every and step % keep_every == 0) and verify_sizes(path) is None
        for step, path in checkpoints_in(checkpoints).items()
    )
