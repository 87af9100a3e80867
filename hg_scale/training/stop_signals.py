"""Signals that ask a run to save and end: noted, and acted on when a step has ended.

Imports no torch, so that the handlers stand before the long start and no signal is lost in it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

_OTHERS_COME = 5.0  # seconds in which ranks that wait for each other may still meet


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

    @contextmanager
    def ending_a_wait(self, end: Callable[[str], object]) -> Iterator[None]:
        """While the main thread waits in C++ for the other ranks, where Python runs no handler.

        Once one of the signals has come, the others get a few seconds to come too, so that all end
        together; then `end` is called on a thread, with the signal in words. It is not to return.
        """
        met = threading.Event()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)

        def watch() -> None:
            while numbers := os.read(reader, 64):  # empty where the other end is closed
                for number in numbers:
                    if number in self._numbers and not met.wait(_OTHERS_COME):
                        end(in_words(number))

        watching = threading.Thread(target=watch, name="stop-signals", daemon=True)
        watching.start()
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            if self.received:  # before the next signals went to `writer`
                os.write(writer, bytes([self.received]))
            yield
        finally:
            signal.set_wakeup_fd(before)
            met.set()
            os.close(writer)
            watching.join()
            os.close(reader)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number

    def __str__(self) -> str:
        return in_words(self.received)


def in_words(number: int) -> str:
    """A signal as one speaks of it: signal USR1."""
    return f"signal {signal.Signals(number).name.removeprefix('SIG')}"
