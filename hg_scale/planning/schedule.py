"""The time of a pipeline step: DeepSpeed's 1F1B schedule with unequal stages, simulated.

DeepSpeed 0.19 (`runtime/pipe/schedule.py`, `TrainSchedule`) gives every stage a list of steps, each
of which exchanges tensors with one neighbour and then runs one forward or backward pass. In its
closed form, with p stages and m micro-batches, stage s runs the forward pass of micro-batch i in
step 2i + s, and its backward pass in step 2i + 2p - 1 - s. What a stage has made is sent at the
start of its next step.

Sends and receives block (`runtime/pipe/p2p.py`): a transfer starts when both stages have reached
it, and occupies both until it ends. Nothing overlaps with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose


@dataclass(frozen=True)
class Schedule:
    """The time of one optimizer step, up to the reduction of gradients.

    `seconds`: from the first forward pass to the end of the last stage's work. By stage: `busy`,
    seconds of its passes; `transferring`, seconds of its transfers. The rest of a stage is idle.
    """

    seconds: float
    busy: tuple[float, ...]
    transferring: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """Share of the time of all stages that is idle: neither computing nor transferring."""
        worked = sum(self.busy) + sum(self.transferring)
        total = self.seconds * len(self.busy)
        return max(0.0, 1 - worked / total) if total else 0.0


def simulate_1f1b(
    forward: Sequence[float],
    backward: Sequence[float],
    transfer: Sequence[float],
    micro_batches: int,
) -> Schedule:
    """Simulate one optimizer step of `micro_batches` micro-batches.

    `forward`, `backward`: seconds of one micro-batch, by stage. `transfer`: seconds of the
    activations of one micro-batch over the boundary between stage s and s + 1; their gradients
    take as long. Raises ValueError where lengths do not match or there is no micro-batch.
    """
    stages = len(forward)
    if not stages or len(backward) != stages or len(transfer) != stages - 1 or micro_batches < 1:
        raise ValueError(
            f"expected times of p stages, p - 1 boundaries and 1 micro-batch or more, got "
            f"{stages} forward, {len(backward)} backward, {len(transfer)} boundaries, "
            f"{micro_batches} micro-batches"
        )
    exchange_twice = [2 * micro_batches * seconds for seconds in (0.0, *transfer, 0.0)]
    return Schedule(
        max(_end_times(forward, backward, transfer, micro_batches)),
        tuple(micro_batches * (f + b) for f, b in zip(forward, backward, strict=True)),
        tuple(exchange_twice[s] + exchange_twice[s + 1] for s in range(stages)),
    )


def _end_times(
    forward: Sequence[float], backward: Sequence[float], transfer: Sequence[float], count: int
) -> list[float]:
    """Return when each stage ends, in seconds after the start."""
    stages = len(forward)
    clocks = [0.0] * stages

    def run_steps(first: int, end: int) -> None:
        for step in range(first, end):
            for s in range(1 - step % 2, stages - 1, 2):  # stages s and s + 1 exchange tensors
                activation, gradient = (step - 1 - s) // 2, (step + 1 + s) // 2 - stages
                tensors = (0 <= activation < count) + (0 <= gradient < count)
                if tensors:
                    met = max(clocks[s], clocks[s + 1])
                    clocks[s] = clocks[s + 1] = met + tensors * transfer[s]
            for s in range(stages):
                if (step + s) % 2 == 0:
                    clocks[s] += forward[s] if 0 <= (step - s) // 2 < count else 0
                else:
                    clocks[s] += backward[s] if 0 <= (step + 1 + s) // 2 - stages < count else 0

    # In steps 2p - 1 to 2m - 1 every stage computes and every boundary carries tensors both ways.
    # A round of two such steps is a max-plus linear function of the clocks: once it adds the same
    # time to all of them, so does every further round.
    step, end_of_full = 2 * stages - 1, 2 * count
    run_steps(0, min(step, 2 * (count + stages - 1)))
    while step + 2 <= end_of_full:
        before = list(clocks)
        run_steps(step, step + 2)
        step += 2
        rises = [after - start for after, start in zip(clocks, before, strict=True)]
        if isclose(min(rises), max(rises), rel_tol=1e-9):  # equal up to the rounding of sums
            rounds = (end_of_full - step) // 2
            clocks[:] = [clock + rounds * rises[0] for clock in clocks]
            step += 2 * rounds
    run_steps(step, 2 * (count + stages - 1))
    return clocks
