"""`hg_scale/train.py` with an injected fault; runs under pytest only.

    HG_FAULT="sleep rank=1 step=3" python tests/faults/train.py --config FILE --run DIR

The fault happens on that rank (without `rank`, on all ranks) at that step.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONG = 600.0  # seconds; longer than any test


@dataclass(frozen=True)
class Fault:
    """A fault of FAULTS, on a rank (None: on all ranks) at a step (from 1)."""

    name: str
    rank: int | None
    step: int

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Parse a text such as `sleep rank=1 step=3`."""
        name, *rest = text.split()
        values = dict(word.split("=") for word in rest)
        rank = int(values["rank"]) if "rank" in values else None
        if name not in FAULTS:
            raise SystemExit(f"HG_FAULT: no fault {name!r}; there are {', '.join(FAULTS)}")
        return cls(name, rank, int(values.get("step", 1)))

    def inject(self, rank: int) -> None:
        """Patch this process if the fault concerns its rank."""
        if "PYTEST_CURRENT_TEST" not in os.environ:
            raise SystemExit("faults are injected under pytest only")
        if self.rank in (None, rank):
            FAULTS[self.name](self.step)


def before_step(action: Callable[[], object]) -> Callable[[int], None]:
    """Call `action` before the engine's part of the step, after its data was read."""

    def inject(step: int) -> None:
        from hg_scale.training.engine import Engine

        original = Engine.train_step

        def train_step(self: Any, batch: Any, number: int, rate: float) -> Any:
            if number == step:
                action()
            return original(self, batch, number, rate)

        Engine.train_step = train_step  # type: ignore[method-assign]

    return inject


def before_batch(action: Callable[[], object]) -> Callable[[int], None]:
    """Call `action` while the step's batch is read; steps count from the start of the process."""

    def inject(step: int) -> None:
        from hg_scale.data.stream import TrainingStream

        original, calls = TrainingStream.next_batch, 0

        def next_batch(self: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                action()
            return original(self)

        TrainingStream.next_batch = next_batch  # type: ignore[method-assign]

    return inject


def scaled_logits(factor: float, once: bool = True) -> Callable[[int], None]:
    """Multiply the logits of the step by `factor`; without `once`, of all later steps too."""

    def inject(step: int) -> None:
        from hg_scale.training.engine import Engine

        original = Engine.train_step

        def train_step(self: Any, batch: Any, number: int, rate: float) -> Any:
            hooks = []
            if number == step or (number > step and not once):
                head = dict(self.model.named_modules())["head.linear"]
                hooks = [head.register_forward_hook(lambda _, __, logits: logits * factor)]
            try:
                return original(self, batch, number, rate)
            finally:
                for hook in hooks:
                    hook.remove()

        Engine.train_step = train_step  # type: ignore[method-assign]

    return inject


def fill_disk(step: int) -> None:
    """Fill the disk of the checkpoints while the step's checkpoint is saved, then free it."""
    from hg_scale.training.checkpointer import Checkpointer

    original = Checkpointer.save

    def save(self: Any, progress: Any, *arguments: Any) -> None:
        filler = self.folder / "filler"
        if progress.step == step:
            self.wait()
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass
        original(self, progress, *arguments)
        if progress.step == step:
            self.wait()
            filler.unlink()

    Checkpointer.save = save  # type: ignore[method-assign]


def fail() -> None:
    """Raise an error that is no UserError."""
    raise RuntimeError("an injected fault")


def run_out_of_memory() -> None:
    """Raise torch's error for a GPU."""
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 80 GiB")


def keep_interpreter() -> None:
    """Hang in C with the interpreter lock, after the other threads have seen the step begin."""
    import ctypes

    time.sleep(2.5)
    ctypes.PyDLL(None).sleep(int(LONG))


FAULTS: dict[str, Callable[[int], None]] = {
    "sleep": before_step(lambda: time.sleep(LONG)),
    "stall": before_batch(lambda: time.sleep(LONG)),
    "freeze": before_step(lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "hold": before_step(keep_interpreter),
    "die": before_step(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "raise": before_step(fail),
    "memory": before_step(run_out_of_memory),
    "nan": scaled_logits(math.nan),
    "nan_from": scaled_logits(math.nan, once=False),
    "spike": scaled_logits(1e3),
    "fill": fill_disk,
}


def train_with(fault: str, arguments: list[str], output: Path) -> None:
    """Run `train.py` with the fault on a rank of `tests.forks`, its output in `output-RANK`."""
    from tests.runs import run_train

    rank = int(os.environ["RANK"])
    Fault.parse(fault).inject(rank)
    try:
        code = run_train(arguments, output)
    except Exception:  # as for an uncaught exception
        with open(f"{output}-{rank}", "a") as terminal:
            traceback.print_exc(file=terminal)
        code = 1
    raise SystemExit(code)


if __name__ == "__main__":
    import argparse

    sys.path[0] = str(Path(__file__).parents[2])
    from hg_scale.parallel.launch import Launch
    from hg_scale.train import add_options, run

    Fault.parse(os.environ["HG_FAULT"]).inject(Launch.from_environment().rank)
    parser = argparse.ArgumentParser()
    add_options(parser)
    sys.exit(run(parser.parse_args()))
