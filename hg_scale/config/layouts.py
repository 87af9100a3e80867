"""Which layouts of a number of processes a configuration could take, its model and batch kept."""

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
    """A way to spread a model over tensor x pipeline x data processes."""

    tensor: int
    pipeline: int
    data: int
    micro_batch_size: int

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def options(self) -> str:
        """What to add to the command line."""
        keys = {
            "parallel.tensor": self.tensor,
            "parallel.pipeline": self.pipeline,
            "training.micro_batch_size": self.micro_batch_size,
        }
        return " ".join(f"--set {key}={value}" for key, value in keys.items())

    def apply(self, config: Config) -> Config:
        """`config` in this layout."""
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
    """As `load_config`, and with `parallel.elastic` in another layout where its own does not fit.

    That is the nearest one of all processes; `fewer`: or the configured one on as many as can be,
    where the nearest has less model parallelism, for which the memory may not be enough. The layout
    comes along where it is another one. Raises ConfigError where there is none.
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
    """The line that says which layout it is."""
    return (
        f"parallel.elastic: going on with {layout.world_size} of {world_size} processes: "
        f"{layout.options()}, global batch {config.training.global_batch_size} as before"
    )


def fitting_layouts(config: Config, world_size: int) -> list[Layout]:
    """Layouts of exactly `world_size` processes with the same global batch, the nearest first.

    The micro-batch is the configured one or the next smaller that divides the batch. Nearest: at
    least as much model parallelism as configured (the memory may need it), as little more as can
    be, with the configured tensor size where possible. Memory itself is not looked at.
    """
    own, wanted = config.parallel, config.parallel.tensor * config.parallel.pipeline

    def distance(layout: Layout) -> tuple[bool, int, bool, int]:
        size = layout.tensor * layout.pipeline
        moved = abs(layout.tensor - own.tensor) + abs(layout.pipeline - own.pipeline)
        return size < wanted, abs(size - wanted), layout.tensor != own.tensor, moved

    found = []
    for tensor in divisors(world_size):
        for pipeline in divisors(world_size // tensor):
            layout = _with_batch(config, tensor, pipeline, world_size // (tensor * pipeline))
            if layout and not cross_checks(layout.apply(config), world_size):
                found.append(layout)
    return sorted(found, key=distance)


def largest_fitting(config: Config, world_size: int) -> Layout | None:
    """The configured tensor and pipeline sizes on as many of `world_size` processes as can be."""
    parallel = config.parallel
    for data in range(world_size // (parallel.tensor * parallel.pipeline), 0, -1):
        layout = _with_batch(config, parallel.tensor, parallel.pipeline, data)
        if layout and not cross_checks(layout.apply(config), layout.world_size):
            return layout
    return None


def _with_batch(config: Config, tensor: int, pipeline: int, data: int) -> Layout | None:
    """The layout whose micro-batch is nearest to the configured one from below, if there is one."""
    training = config.training
    if training.global_batch_size % data:
        return None
    each = training.global_batch_size // data
    micro = max(m for m in divisors(each) if m <= training.micro_batch_size)
    return Layout(tensor, pipeline, data, micro)
