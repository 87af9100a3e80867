"""How the last start of a run ended: `RUN/end.json`, written by rank 0 however it ends by itself.

A killed rank cannot write it; its heartbeat then shows that it died. The next start removes it.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field
from typing_extensions import TypedDict  # that of typing lacks what pydantic needs before 3.12

from hg_scale.atomic_write import write_json
from hg_scale.bounded_read import RECORD_BYTES, FormatError, read_json, validated

_NAME = "end.json"


class EndEntry(TypedDict):
    """The content of `end.json`, and of a rank's end file."""

    code: Annotated[int, Field(ge=0, le=255)]
    line: str


class RunEnd(NamedTuple):
    """Exit code and reason in one line; `written`: the time of the file."""

    code: int
    line: str
    written: float

    def describe(self, now: float) -> str:
        """Return the reason and its age, as `step 9 of 9 saved in ..., 0:01:00 ago`."""
        from hg_scale.training.console import format_duration

        return f"{self.line}, {format_duration(max(0, now - self.written))} ago"


def write_run_end(run: Path, code: int, line: str) -> None:
    """Record the end; ignore a disk that is not writable."""
    with suppress(OSError):
        write_json(run / _NAME, {"code": code, "line": line, "time": time.time()})


def clear_run_end(run: Path) -> None:
    """Remove the record of an earlier start."""
    with suppress(OSError):
        (run / _NAME).unlink(missing_ok=True)


def read_run_end(run: Path) -> RunEnd | None:
    """Return the record, or None if there is none that can be read."""
    path = run / _NAME
    with suppress(OSError, FormatError):
        end: EndEntry = validated(EndEntry, read_json(path, RECORD_BYTES))
        return RunEnd(end["code"], end["line"], path.stat().st_mtime)
    return None
