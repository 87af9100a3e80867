"""Parallel layouts that fit a number of processes, with the model and the batch unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hg_scale.config.arithmetic import divisors
from hg_scale.config.checks import cross_checks
from hg_scale.config.errors import ConfigError
from hg_scale.config.load import load_config
from hg_scale.config.schema import Config


@dataclass(frozen=True)
class Layout:
    """Sizes of tensor, pipeline and data parallelism, and a micro-batch size that fits."""

    tensor: int
    pipeline: int
    data: int
    micro_batch_size: int

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def options(self) -> str:
        """Return the command-line options that select this layout."""
        keys = {
            "parallel.tensor": self.tensor,
            "parallel.pipeline": self.pipeline,
            "training.micro_batch_size": self.micro_batch_size,
        }
        return " ".join(f"--set {key}={value}" for key, value in keys.items())

    def apply(self, config: Config) -> Config:
        """Return `config` in this layout."""
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline}
        batch = {"micro_batch_size": self.micro_batch_size}
        return config.model_copy(
            update={
                "parallel": config.parallel.model_copy(update=sizes),
                "training": config.training.model_copy(update=batch),
            }
        )


def load_elastic(
    path: Path, overrides: Sequence[str], world_size: int, *, fewer: bool = False
) -> tuple[Config, Layout | None]:
    """Load a configuration; with `parallel.elastic`, change a layout that does not fit.

    The new layout is the nearest one for `world_size` processes. With `fewer` it is the configured
    one on as many processes as possible if the nearest has less model parallelism, for which the
    memory may not suffice. Returns the configuration, and the layout if it changed. Raises
    ConfigError if no layout fits.
    """
    try:
        return load_config(path, overrides, world_size=world_size), None
    except ConfigError as error:
        try:
            config = load_config(path, overrides)
        except ConfigError:
            raise error from None
        if not config.parallel.elastic:
            raise
        layout = next(iter(fitting_layouts(config, world_size)), None)
        own = config.parallel.tensor * config.parallel.pipeline
        if fewer and (layout is None or layout.tensor * layout.pipeline < own):
            layout = largest_fitting(config, world_size) or layout
        if layout is None:
            raise
        return layout.apply(config), layout


def elastic_line(config: Config, layout: Layout, world_size: int) -> str:
    """Return the line that reports the changed layout."""
    return (
        f"parallel.elastic: continuing with {layout.world_size} of {world_size} processes: "
        f"{layout.options()}, global batch {config.training.global_batch_size} as before"
    )


def fitting_layouts(config: Config, world_size: int) -> list[Layout]:
    """Return the layouts of exactly `world_size` processes with the same global batch.

    The nearest comes first: at least as much model parallelism as configured (the memory may need
    it), as little more as possible, with the configured tensor size where possible. Memory itself
    is not estimated. The micro-batch is the configured one or the next smaller that divides the
    batch.
    """
    own, configured = config.parallel, config.parallel.tensor * config.parallel.pipeline

    def distance(layout: Layout) -> tuple[bool, int, bool, int]:
        size = layout.tensor * layout.pipeline
        moved = abs(layout.tensor - own.tensor) + abs(layout.pipeline - own.pipeline)
        return size < configured, abs(size - configured), layout.tensor != own.tensor, moved

    found = []
    for tensor in divisors(world_size):
        for pipeline in divisors(world_size // tensor):
            layout = _with_batch(config, tensor, pipeline, world_size // (tensor * pipeline))
            if layout and not cross_checks(layout.apply(config), world_size):
                found.append(layout)
    return sorted(found, key=distance)


def largest_fitting(config: Config, world_size: int) -> Layout | None:
    """Return the configured layout on as many of `world_size` processes as possible."""
    parallel = config.parallel
    for data in range(world_size // (parallel.tensor * parallel.pipeline), 0, -1):
        layout = _with_batch(config, parallel.tensor, parallel.pipeline, data)
        if layout and not cross_checks(layout.apply(config), layout.world_size):
            return layout
    return None


def _with_batch(config: Config, tensor: int, pipeline: int, data: int) -> Layout | None:
    """Return the layout with the largest micro-batch up to the configured one, if one fits."""
    training = config.training
    if training.global_batch_size % data:
        return None
    per_rank = training.global_batch_size // data
    micro = max(m for m in divisors(per_rank) if m <= training.micro_batch_size)
    return Layout(tensor, pipeline, data, micro)
