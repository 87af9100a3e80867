"""Learning-rate schedules: linear warm-up, then cosine, inverse square root or WSD.

Steps are counted from 1; the update of step n uses the rate of step n. The functions below return
fractions of the peak; `LearningRateSchedule` multiplies them by the peak rate.
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
    """The learning rate as a function of the step: `schedule(step)`.

    `cosine`: half a cosine over `cycle_steps`, counted after the warm-up. The default is
    `total_steps`, as in the paper: the rate then ends a little above its minimum.
    `rsqrt`: proportional to 1 / sqrt(step); over the last `decay_steps` half a cosine down to the
    minimum.
    `wsd` (warm-up, stable, decay): constant at the peak; over the last `decay_steps` it falls as
    1 - p (`linear`) or 1 - sqrt(p) (`sqrt`), where p is the fraction of these steps.
    `minimum_ratio`: the lowest rate after the warm-up, as a fraction of the peak.
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
        """Make the schedule of a run; its peak is `optimizer.learning_rate`."""
        return cls(
            peak=config.optimizer.learning_rate,
            total_steps=config.training.steps,
            **config.schedule.model_dump(),
        )

    def __call__(self, step: int) -> float:
        """Return the learning rate of update `step`, counted from 1."""
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
        # Cosine and WSD are scaled to end at the floor; rsqrt is clipped there.
        fraction = max(floor, fraction) if self.kind == "rsqrt" else floor + (1 - floor) * fraction
        return self.peak * warmup(step, self.warmup_steps) * fraction


def warmup(step: int, steps: int) -> float:
    """Rise linearly from 0 at step 0 to 1 at `steps`, then stay."""
    return min(1.0, step / steps) if steps else 1.0


def cosine(step: int, warmup_steps: int, cycle: int) -> float:
    """Stay at 1 until the end of the warm-up, then fall to 0 in `cycle` steps by half a cosine."""
    return _half_cosine(step - warmup_steps, cycle)


def rsqrt(step: int, warmup_steps: int, decay_start: int, decay_steps: int) -> float:
    """Stay at 1 during the warm-up, then sqrt(warmup_steps / step), then half a cosine to 0."""
    reference = max(warmup_steps, 1)
    if not decay_steps or step <= decay_start:
        return sqrt(reference / max(step, reference))
    reached = sqrt(reference / max(decay_start, reference))
    return reached * _half_cosine(step - decay_start, decay_steps)


def stable_decay(step: int, decay_start: int, decay_steps: int, shape: DecayShape) -> float:
    """Stay at 1 until `decay_start`, then fall to 0 in `decay_steps`."""
    if not decay_steps:
        return 1.0
    progress = _clip((step - decay_start) / decay_steps)
    return 1 - (sqrt(progress) if shape == "sqrt" else progress)


def _half_cosine(step: int, steps: int) -> float:
    return 0.5 * (1 + cos(pi * _clip(step / steps)))


def _clip(fraction: float) -> float:
    return min(1.0, max(0.0, fraction))
