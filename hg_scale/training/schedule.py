"""The learning rate of every optimizer step: a warm-up, then one of three shapes.

Steps are counted from 1: the rate of step n is the one its update uses. The three shapes are
fractions of the peak, as plain functions; `LearningRateSchedule` scales them by the peak rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sqrt
from typing import Literal

from hg_scale.config.schema import Config

ScheduleKind = Literal["cosine", "rsqrt", "wsd"]
DecayShape = Literal["linear", "sqrt"]


@dataclass(frozen=True)
class LearningRateSchedule:
    """Learning rate by step, `schedule(step)`; past `total_steps` it stays where it ended.

    `cosine` falls in one half wave of `cycle_steps`, counted after the warm-up. The default is
    `total_steps`, as in the paper: the rate then ends a little above its minimum.
    `rsqrt` falls with the root of the step; over the last `decay_steps` a half cosine takes it from
    the value it has reached to the minimum.
    `wsd` stays at the peak and falls over the last `decay_steps`, as 1 - p (`linear`) or
    1 - sqrt(p) (`sqrt`) of their progress p.
    `minimum_ratio` is the lowest rate after the warm-up, as a fraction of the peak.
    """

    kind: ScheduleKind
    peak: float
    total_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    decay_shape: DecayShape = "linear"
    cycle_steps: int | None = None
    minimum_ratio: float = 0.0

    @classmethod
    def from_config(cls, config: Config) -> LearningRateSchedule:
        """The schedule of a run; its peak is `optimizer.learning_rate`."""
        return cls(
            peak=config.optimizer.learning_rate,
            total_steps=config.training.steps,
            **config.schedule.model_dump(),
        )

    def __call__(self, step: int) -> float:
        """The rate of the `step`-th update, the first being 1."""
        match self.kind:
            case "cosine":
                cycle = self.cycle_steps or self.total_steps
                fraction = cosine(step, self.warmup_steps, cycle)
            case "rsqrt":
                decay_start = self.total_steps - self.decay_steps
                fraction = rsqrt(step, self.warmup_steps, decay_start, self.decay_steps)
            case "wsd":
                decay_start = self.total_steps - self.decay_steps
                fraction = stable_decay(step, decay_start, self.decay_steps, self.decay_shape)
            case _:
                raise ValueError(f"schedule {self.kind!r} is not one of cosine, rsqrt, wsd")
        floor = self.minimum_ratio
        # A wave ends at the floor; the root never ends, and is cut off there.
        fraction = max(floor, fraction) if self.kind == "rsqrt" else floor + (1 - floor) * fraction
        return self.peak * warmup(step, self.warmup_steps) * fraction


def warmup(step: int, steps: int) -> float:
    """A line from 0 before the first step to 1 at `steps`."""
    return min(1.0, step / steps) if steps else 1.0


def cosine(step: int, warmup_steps: int, cycle: int) -> float:
    """Half a wave from 1 to 0 in the `cycle` steps after the warm-up."""
    return _half_wave(step - warmup_steps, cycle)


def rsqrt(step: int, warmup_steps: int, decay_start: int, decay_steps: int) -> float:
    """1 until the end of the warm-up, then sqrt(warmup_steps / step); half a wave to 0 at last."""
    reference = max(warmup_steps, 1)
    if not decay_steps or step <= decay_start:
        return sqrt(reference / max(step, reference))
    reached = sqrt(reference / max(decay_start, reference))
    return reached * _half_wave(step - decay_start, decay_steps)


def stable_decay(step: int, decay_start: int, decay_steps: int, shape: DecayShape) -> float:
    """1 until `decay_start`, 0 after `decay_steps` more."""
    if not decay_steps:
        return 1.0
    progress = _clip((step - decay_start) / decay_steps)
    return 1 - (sqrt(progress) if shape == "sqrt" else progress)


def _half_wave(step: int, steps: int) -> float:
    return 0.5 * (1 + cos(pi * _clip(step / steps)))


def _clip(fraction: float) -> float:
    return min(1.0, max(0.0, fraction))
