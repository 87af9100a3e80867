"""How long a step of a pipeline takes: DeepSpeed's 1F1B schedule, simulated. Imports no torch.

The formula (p - 1) / (m + p - 1) of the idle share holds for equal stages only; those of an
Hourglass differ, since a block costs what its level costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Action:
    """What a stage does next: a pass of a micro-batch, or a transfer to or from a neighbour.

    `kind` "forward" or "backward": a pass, `stage` is its own. "activations" or "gradients": a
    transfer over the boundary between `stage` and `stage` + 1.
    """

    kind: str
    stage: int
    micro_batch: int


@dataclass(frozen=True)
class Step:
    """A simulated training step: its seconds, and those that each stage spends in its passes."""

    seconds: float
    busy: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """Share of the stages' time in which they wait or transfer."""
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds) if self.seconds else 0.0


def stage_actions(stage: int, stages: int, micro_batches: int) -> Iterator[Action]:
    """Yield what a stage does in a step, in the order of DeepSpeed's `TrainSchedule`.

    At tick t stage s runs micro-batch (t - s) / 2 forward where t - s is even, and micro-batch
    (t + s + 1) / 2 - p backward where it is odd. The result of a tick is sent in the next one.
    """
    previous = -1
    for tick in range(2 * (micro_batches + stages - 1)):
        forward = (tick - stage) % 2 == 0
        current = (tick - stage) // 2 if forward else (tick + stage + 1) // 2 - stages
        sends, runs = 0 <= previous < micro_batches, 0 <= current < micro_batches
        if forward and stage > 0:
            if sends:
                yield Action("gradients", stage - 1, previous)
            if runs:
                yield Action("activations", stage - 1, current)
        if not forward and stage < stages - 1:
            if runs:
                yield Action("gradients", stage, current)
            if sends:
                yield Action("activations", stage, previous)
        if runs:
            yield Action("forward" if forward else "backward", stage, current)
        previous = current


def simulate_step(
    forward: Sequence[float],
    backward: Sequence[float],
    transfer: Sequence[float],
    micro_batches: int,
) -> Step:
    """Simulate a step.

    forward, backward: seconds of a micro-batch in each stage. transfer: seconds to send it over
    each boundary, in either direction; one fewer. A transfer begins once both stages have come to
    it, and both wait for its end, as with DeepSpeed's blocking sends.
    """
    stages = len(forward)
    actions = [list(stage_actions(stage, stages, micro_batches)) for stage in range(stages)]
    clock, position = [0.0] * stages, [0] * stages
    ready = list(range(stages))  # stages whose next action may be possible
    while ready:
        stage = ready.pop()
        while position[stage] < len(actions[stage]):
            action = actions[stage][position[stage]]
            if action.kind in ("forward", "backward"):
                clock[stage] += (forward if action.kind == "forward" else backward)[stage]
                position[stage] += 1
                continue
            other = action.stage if stage != action.stage else action.stage + 1
            if position[other] == len(actions[other]) or actions[other][position[other]] != action:
                break  # the neighbour wakes this stage up when it gets here
            end = max(clock[stage], clock[other]) + transfer[action.stage]
            clock[stage] = clock[other] = end
            position[stage] += 1
            position[other] += 1
            ready.append(other)
    busy = tuple(micro_batches * (f + b) for f, b in zip(forward, backward, strict=True))
    return Step(max(clock), busy)
