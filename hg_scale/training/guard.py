"""Which steps are bad: a loss or gradients that are not finite, or a spike of the loss.

Every rank asks its own `Guard` before each update, with figures that are alike on all ranks, so
that all skip the same steps.

A spike is a loss more than `spike_sigma` standard deviations above the mean of the last `window`
good losses. Those are good ones only, so that no outlier widens the band; while the loss falls,
the mean lies above it and the deviation includes the fall, so that few are taken for spikes.
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
from hg_scale.config.schema import GuardConfig
from hg_scale.errors import UserError
from hg_scale.exit_codes import GAVE_UP
from hg_scale.training.agreement import stop_all
from hg_scale.training.gradients import gradients_by_parameter

_NAMED = 4  # tensors in a line; the others are counted


class GaveUp(UserError):
    """Too many of the last steps were bad, the first of them being step `first`.

    The checkpoint to go back to is looked for when this is told: a save may still be under way
    when it is raised.
    """

    exit_code = GAVE_UP

    def __init__(self, reason: str, first: int, checkpoints: Path) -> None:
        super().__init__(reason)
        self.first, self.checkpoints = first, checkpoints

    def __str__(self) -> str:
        good = newest_before(self.checkpoints, self.first)
        if good is None:
            advice = "no checkpoint is older than these; start a new run"
        else:
            advice = f"the last good checkpoint is {good}; start a new run from it (--run NEW "
            advice += f"--set checkpoint.start_from={good})"
        return f"{self.args[0]}; {advice} with a lower optimizer.learning_rate or another seed"


class Guard:
    """Judges every step by those before it."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window)  # of the last good steps
        self._skipped: deque[int] = deque()  # steps skipped among the last `window`

    def judge(self, loss: float, finite_gradients: bool) -> str | None:
        """Why a step with this mean loss must not be taken; None: it may."""
        if not isfinite(loss):
            return "the loss is not finite"
        if not finite_gradients:
            return "gradients are not finite"
        sigma, count = self._config.spike_sigma, len(self._losses)
        if sigma is None or 2 * count < self._config.window:
            return None
        # Exact arithmetic, and so alike on processors of all kinds.
        mean, deviation = fmean(self._losses), pstdev(self._losses)
        if deviation == 0 or loss <= mean + sigma * deviation:
            return None
        above = (loss - mean) / deviation
        return f"loss {loss:.4g} is {above:.1f} sigma above the last {count}, {mean:.4g}"

    def note(self, step: int, loss: float, skipped: bool) -> None:
        """What became of a step."""
        if skipped:
            self._skipped.append(step)
        else:
            self._losses.append(loss)
        while self._skipped and self._skipped[0] <= step - self._config.window:
            self._skipped.popleft()

    def require_better(self, step: int, why: str, checkpoints: Path) -> None:
        """Raise GaveUp after too many bad steps, the last of which is `step`, for `why`.

        On all ranks; one of them tells it.
        """
        window, most = self._config.window, self._config.max_skipped
        if len(self._skipped) > most:
            reason = (
                f"gave up after step {step}: {len(self._skipped)} of the last {min(step, window)} "
                f"steps were skipped, more than guard.max_skipped = {most}, the last since {why}"
            )
            stop_all(GaveUp(reason, self._skipped[0], checkpoints), teller=0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint carries, so that a resumed run judges as an undisturbed one."""
        return {"losses": list(self._losses), "skipped": list(self._skipped)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`; from nothing, of an older checkpoint, it begins anew."""
        self._losses = deque(state.get("losses", ()), maxlen=self._config.window)
        self._skipped = deque(state.get("skipped", ()))


def newest_before(checkpoints: Path, step: int) -> Path | None:
    """The newest whole checkpoint of a step before `step`."""
    if not checkpoints.is_dir():
        return None
    found = checkpoints_in(checkpoints)
    older = (found[of] for of in sorted(found, reverse=True) if of < step)
    return next((path for path in older if verify_sizes(path) is None), None)


def name_culprits(
    why: str, mean_loss: Tensor, engine: Any, slices: Mapping[nn.Parameter, Slice]
) -> str:
    """`why` with what is not finite, and the ranks that hold it.

    Data-parallel ranks hold the sum of their gradients, so that what one of them spoils they all
    hold; a loss is each rank's own. A collective operation of all ranks.
    """
    names = [
        slices[parameter].name
        for parameter, gradient in gradients_by_parameter(engine, slices)
        if not bool(gradient.isfinite().all())
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (float(mean_loss), names))
    return describe_culprits(why, everyone)


def describe_culprits(why: str, everyone: list[tuple[float, list[str]]]) -> str:
    """`everyone`: each rank's loss and the names of its tensors that are not finite."""
    losses = [f"{loss} on rank {r}" for r, (loss, _) in enumerate(everyone) if not isfinite(loss)]
    ranks: dict[str, list[int]] = defaultdict(list)
    for rank, (_, names) in enumerate(everyone):
        for name in names:
            ranks[name].append(rank)
    said = [f"the loss is {_first(losses)}"] if losses else []
    if ranks:
        tensors = _first([f"{name} ({_ranks(on)})" for name, on in ranks.items()])
        count = "1 tensor" if len(ranks) == 1 else f"{len(ranks)} tensors"
        said.append(f"gradients of {count} are not finite: {tensors}")
    return "; ".join(said) or why


def _first(items: list[str]) -> str:
    more = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return "ranks " + _first([str(rank) for rank in ranks])
