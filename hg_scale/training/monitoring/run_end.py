"""How the last start of a run ended: `RUN/end.json`, written by rank 0 however it ends by itself.

A killed rank cannot write it; its heartbeat then shows that it died. The next start removes it.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from hg_scale.atomic_write import write_json

_NAME = "end.json"


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
    with suppress(OSError, ValueError, KeyError, TypeError):
        path = run / _NAME
        record = json.loads(path.read_text())
        return RunEnd(int(record["code"]), str(record["line"]), path.stat().st_mtime)
    return None
