"""Signals that ask a run to save and end: noted, and acted on when a step has ended.

Imports no torch, so that the handlers stand before the long start and no signal is lost in it.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any


class StopSignals:
    """Notes the first of some signals, as a context manager of the main thread.

    Nothing else happens then: a step under way, its collective operations and its save go on.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        """`names` as in `training.stop_signals`: TERM, USR1, ..."""
        self.received = 0  # its number
        self._numbers = [getattr(signal, f"SIG{name}") for name in names]
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in self._numbers:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number

    def __str__(self) -> str:
        return in_words(self.received)


def in_words(number: int) -> str:
    """A signal as one speaks of it: signal USR1."""
    return f"signal {signal.Signals(number).name.removeprefix('SIG')}"
