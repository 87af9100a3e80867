"""Console output of a run: one live line on a terminal, else one plain line per logged step.

DeepSpeed, Megatron, webdataset and the compilers they start print to stdout and stderr, some from
C++. `quiet_libraries` redirects both file descriptors to a log file of the rank, so that only
`Console` still writes to the terminal. Lines of the `deepspeed` launcher come from another process
and still appear there.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from rich import console as rich
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from hg_scale.standard_streams import lossy_stream


class Console:
    """Prints the lines of a run: rank 0 everything, the other ranks warnings only.

    A context manager: the live line ends with it. Records are those of `metrics.jsonl`; keys that
    a record lacks are left out. `tty`: whether to draw a live line (None: if `stream`, by default
    stdout, is a terminal).
    """

    def __init__(
        self,
        total_steps: int,
        *,
        rank: int = 0,
        tty: bool | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps, self.rank = total_steps, rank
        self._stream = stream or sys.stdout
        self._eta = _Eta(total_steps, clock)
        self._live: Progress | None = None
        self._task = TaskID(0)
        if rank == 0 and (_is_terminal(self._stream) if tty is None else tty):
            self._live = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=16),
                TextColumn(
                    "{task.description}",
                    markup=False,
                    table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
                ),
                console=_Terminal(file=self._stream, force_terminal=True),
                refresh_per_second=4,
                expand=True,
                # Lines of libraries go to the log file, not above the live line.
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._live.add_task("", total=total_steps)

    def __enter__(self) -> Console:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def advance(self, step: int) -> None:
        """Move the bar of the live line to `step`, which is done."""
        if self._live:
            self._live.update(self._task, completed=step)

    def step(self, record: Mapping[str, Any]) -> None:
        """Show a logged step."""
        if self.rank != 0:
            return
        step, figures = record["step"], step_figures(record, self._eta.seconds(record["step"]))
        if self._live:
            self._live.update(self._task, completed=step, description=figures)
        else:
            width = len(str(self.total_steps))
            self._write(f"step {step:>{width}}/{self.total_steps}  {figures}".rstrip())

    def validation(self, record: Mapping[str, Any]) -> None:
        """Show a validation; on a terminal it stays above the live line."""
        self.print(validation_line(record))

    def skipped(self, record: Mapping[str, Any]) -> None:
        """Show a step that was skipped."""
        if self.rank == 0:
            self.warn(f"step {record['step']} skipped: {record['skipped']}")

    def print(self, message: str) -> None:
        """Print a line, on rank 0 only."""
        if self.rank == 0:
            self._write(message)

    def warn(self, message: str) -> None:
        """Print a warning with the number of the rank, on any rank."""
        self._write(f"warning (rank {self.rank}): {message}")

    def print_unlocked(self, line: str) -> None:
        """Print the last line of a process that is about to exit, on any rank.

        Takes no lock and uses no buffer, since another thread may hang in either. Clears the live
        line and shows the cursor again. Writes to the terminal and to the rank's log file.
        """
        text = f"\r\x1b[2K\x1b[?25h{line}\n" if self._live else f"{line}\n"
        for fileno in (self._stream.fileno, lambda: 2):  # 2 is redirected to the log file
            with suppress(OSError, ValueError):
                os.write(fileno(), text.encode())

    def _write(self, line: str) -> None:
        if self._live:
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()


def _is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal with a width: mpirun's ranks get one of width 0 for a file."""
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


class _Terminal(rich.Console):
    """A rich console as wide as the terminal behind its stream.

    rich would query stdin, stdout and stderr, which `quiet_libraries` may have redirected.
    """

    @property  # type: ignore[misc]  # in rich it has a setter
    def size(self) -> rich.ConsoleDimensions:
        try:
            columns, lines = os.get_terminal_size(self.file.fileno())
        except (OSError, ValueError):  # not a real terminal
            columns = 0
        return rich.ConsoleDimensions(columns, lines) if columns else super().size


class _Eta:
    """Estimates the time left; the first logged step, which includes compilation, is left out."""

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self._total, self._clock = total_steps, clock
        self._first: tuple[int, float] | None = None

    def seconds(self, step: int) -> float | None:
        """Return the seconds left at `step`; None at the first step, without an estimate."""
        now = self._clock()
        if self._first is None:
            self._first = step, now
        first_step, first_time = self._first
        if step <= first_step:
            return None
        return (now - first_time) / (step - first_step) * (self._total - step)


_STEP_FIELDS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("loss", "loss {:.4f}".format),
    ("bits_per_byte", "bpb {:.4f}".format),
    ("grad_norm", "grad {:.3f}".format),
    ("learning_rate", "lr {:.2e}".format),
    ("tokens_per_second", lambda rate: f"{format_rate(rate)} tok/s"),
    ("mfu", "mfu {:.1%}".format),
)
_VALIDATION_FIELDS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("validation_loss", "loss {:.4f}".format),
    ("validation_bits_per_byte", "bpb {:.4f}".format),
)


def step_figures(record: Mapping[str, Any], eta: float | None) -> str:
    """Return the figures of a logged step in one line; `eta` in seconds."""
    time_left = [] if eta is None else [f"eta {format_duration(eta)}"]
    return "  ".join((*_fields(record, _STEP_FIELDS), *time_left))


def validation_line(record: Mapping[str, Any]) -> str:
    """Return the line of a validation."""
    return "  ".join((f"validation at step {record['step']}", *_fields(record, _VALIDATION_FIELDS)))


def _fields(
    record: Mapping[str, Any], fields: tuple[tuple[str, Callable[[float], str]], ...]
) -> list[str]:
    return [show(record[key]) for key, show in fields if record.get(key) is not None]


def format_rate(number: float) -> str:
    """Format a number with three digits and an SI suffix: 812, 31.2k, 4.05M."""
    for suffix in ("", "k", "M", "G"):
        if not number >= 999.5 or suffix == "G":  # `not >=` also stops at NaN
            break
        number /= 1000
    return f"{number:.3g}{suffix}"


def format_duration(seconds: float) -> str:
    """Format a duration as hours, minutes and seconds, or with days: 1:02:03, 2d 03:04."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02}:{minutes:02}" if days else f"{hours}:{minutes:02}:{rest:02}"


@contextmanager
def quiet_libraries(log: Path) -> Iterator[TextIO]:
    """Redirect stdout and stderr of this process and its children to the file `log`.

    Yields a stream to the original stdout, for `Console`. Enter it before DeepSpeed is imported.
    The traceback of an error goes to the file, after the output of libraries, and to the terminal,
    where a last line names the file. A crash in C++ prints its Python stack to the terminal.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    saved = os.dup(1), os.dup(2)
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # Line buffering, so that the last lines of a killed run are in the file.
    buffered = [s for s in (sys.stdout, sys.stderr) if isinstance(s, TextIOWrapper)]
    modes = [stream.line_buffering for stream in buffered]
    for stream in buffered:
        stream.reconfigure(line_buffering=True)
    faulthandler_enabled = faulthandler.is_enabled()
    faulthandler.enable(file=saved[1])
    terminal = lossy_stream(saved[0])  # a terminal that goes must not end the run
    failed = False
    try:
        yield terminal
    except Exception:
        failed = True
        traceback.print_exc()
        raise
    finally:
        terminal.close()
        _flush()
        faulthandler.disable()
        for fd, original in enumerate(saved, start=1):
            os.dup2(original, fd)
            os.close(original)
        for stream, mode in zip(buffered, modes, strict=True):
            stream.reconfigure(line_buffering=mode)
        if faulthandler_enabled and sys.__stderr__ is not None:
            faulthandler.enable(file=sys.__stderr__)
        if failed:
            print(f"output of libraries before this error: {log}", file=sys.stderr)


def _flush() -> None:
    """Flush the buffers of Python and C for stdout and stderr, before the descriptors change."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError):  # what cannot be written is lost
                stream.flush()
    ctypes.CDLL(None).fflush(None)
