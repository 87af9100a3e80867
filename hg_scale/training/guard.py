"""Bad steps, which the optimizer skips: a loss or gradients not finite, or a loss spike.

Every rank has its own `Guard` and judges by figures that are identical on all ranks, so that all
skip the same steps.

A spike is a loss more than `spike_sigma` standard deviations above the mean of the last `window`
good losses. Bad losses are left out, so that no outlier raises the threshold. While the loss falls,
the mean is above it and the deviation includes the fall, so few good steps are judged as spikes.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from hg_scale.checkpoint.find import checkpoints_in, verify_sizes
from hg_scale.checkpoint.fragments import Slice
from hg_scale.config.training_sections import GuardConfig
from hg_scale.errors import UserError
from hg_scale.exit_codes import GAVE_UP
from hg_scale.parallel.deepspeed_adapter import gradients_by_parameter
from hg_scale.training.agreement import stop_all

_NAMED = 4  # tensors named in a message; the others are counted


class TooManySkippedSteps(UserError):
    """Too many of the last steps were bad; `first` is the first of them.

    The message looks for the checkpoint to return to when it is printed: a save may still be
    running when this is raised.
    """

    exit_code = GAVE_UP

    def __init__(self, reason: str, first: int, checkpoints: Path) -> None:
        super().__init__(reason)
        self.first, self.checkpoints = first, checkpoints

    def __str__(self) -> str:
        good = newest_before(self.checkpoints, self.first)
        if good is None:
            advice = "no checkpoint is older than these steps; start a new run"
        else:
            advice = f"the last good checkpoint is {good}; start a new run from it (--run NEW "
            advice += f"--set checkpoint.start_from={good})"
        return f"{self.args[0]}; {advice} with a lower optimizer.learning_rate or another seed"


class Guard:
    """Judges every step by the losses of the steps before it."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window)  # of the last good steps
        self._skipped: deque[int] = deque()  # steps skipped among the last `window`

    def judge(self, loss: float, finite_gradients: bool) -> str | None:
        """Return why a step with this mean loss is bad, or None if it is good."""
        if not isfinite(loss):
            return "the loss is not finite"
        if not finite_gradients:
            return "gradients are not finite"
        sigma, count = self._config.spike_sigma, len(self._losses)
        if sigma is None or 2 * count < self._config.window:
            return None
        # fmean and pstdev are exact, and so identical on all processors.
        mean, deviation = fmean(self._losses), pstdev(self._losses)
        if deviation == 0 or loss <= mean + sigma * deviation:
            return None
        above = (loss - mean) / deviation
        return f"loss {loss:.4g} is {above:.1f} sigma above the last {count}, {mean:.4g}"

    def record(self, step: int, loss: float, skipped: bool) -> None:
        """Record the outcome of a step that was judged."""
        if skipped:
            self._skipped.append(step)
        else:
            self._losses.append(loss)
        while self._skipped and self._skipped[0] <= step - self._config.window:
            self._skipped.popleft()

    def require_progress(self, step: int, reason: str, checkpoints: Path) -> None:
        """Raise TooManySkippedSteps on all ranks if too many of the last steps were bad.

        `reason`: why the last of them, `step`, was bad.
        """
        window, limit = self._config.window, self._config.max_skipped
        if len(self._skipped) > limit:
            message = (
                f"gave up after step {step}: {len(self._skipped)} of the last {min(step, window)} "
                f"steps were skipped, more than guard.max_skipped = {limit}; the last: {reason}"
            )
            stop_all(TooManySkippedSteps(message, self._skipped[0], checkpoints), reporting_rank=0)

    def state(self) -> dict[str, Any]:
        """Return the state to save, so that a resumed run judges like an uninterrupted one."""
        return {"losses": list(self._losses), "skipped": list(self._skipped)}

    def load(self, state: dict[str, Any]) -> None:
        """Restore `state()`; checkpoints of older versions have none ({})."""
        self._losses = deque(state.get("losses", ()), maxlen=self._config.window)
        self._skipped = deque(state.get("skipped", ()))


def newest_before(checkpoints: Path, step: int) -> Path | None:
    """Return the newest complete checkpoint of a step before `step`, or None."""
    if not checkpoints.is_dir():
        return None
    found = checkpoints_in(checkpoints)
    older = (found[of] for of in sorted(found, reverse=True) if of < step)
    return next((path for path in older if verify_sizes(path) is None), None)


def name_culprits(
    reason: str, mean_loss: Tensor, engine: Any, slices: Mapping[nn.Parameter, Slice]
) -> str:
    """Describe which losses and gradients are not finite, on which ranks; if none, `reason`.

    Gradients are reduced over data-parallel ranks, so a NaN of one of them is on all; the loss is
    each rank's own. A collective.
    """
    names = [
        slices[parameter].name
        for parameter, gradient in gradients_by_parameter(engine, slices)
        if not bool(gradient.isfinite().all())
    ]
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, (float(mean_loss), names))
    return describe_culprits(reason, by_rank)


def describe_culprits(reason: str, by_rank: list[tuple[float, list[str]]]) -> str:
    """Format `name_culprits`. by_rank: each rank's loss and names of gradients not finite."""
    losses = [f"{loss} on rank {r}" for r, (loss, _) in enumerate(by_rank) if not isfinite(loss)]
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, (_, names) in enumerate(by_rank):
        for name in names:
            ranks[name].append(rank)
    messages = [f"the loss is {_first(losses)}"] if losses else []
    if ranks:
        tensors = _first([f"{name} ({_ranks(on)})" for name, on in ranks.items()])
        count = "1 tensor" if len(ranks) == 1 else f"{len(ranks)} tensors"
        messages.append(f"gradients of {count} are not finite: {tensors}")
    return "; ".join(messages) or reason


def _first(items: list[str]) -> str:
    more = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return "ranks " + _first([str(rank) for rank in ranks])
