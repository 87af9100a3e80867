"""Errors in a configuration, reported in lines that say what to do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hg_scale.errors import UserError
from hg_scale.exit_codes import CONFIG_ERROR

_ABSENT = object()


def format_value(value: Any) -> str:
    """Return a value as JSON; lists and objects are truncated to fit on a line."""
    text = json.dumps(value, default=str)
    truncated = isinstance(value, list | dict) and len(text) > 80
    return f"{text[:76]} ..." if truncated else text


@dataclass(frozen=True)
class Problem:
    """One error: the dotted `key`, and a message with what is expected and what to do.

    `depends_on`: further keys that the check involves. If one of those is invalid itself, this
    problem may be a mere consequence and is not reported.
    """

    key: str
    message: str
    value: Any = _ABSENT
    depends_on: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.value is _ABSENT:
            return f"{self.key}: {self.message}"
        return f"{self.key} = {format_value(self.value)}: {self.message}"


class ConfigError(UserError):
    """An invalid configuration; `problems` lists every error found.

    `advice`: further lines on what to do about all of them.
    """

    exit_code = CONFIG_ERROR

    def __init__(
        self, problems: list[Problem], source: str = "", advice: Sequence[str] = ()
    ) -> None:
        self.problems = problems
        where = f" in {source}" if source else ""
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = "".join(f"\n  {line}" for line in (*problems, *advice))
        super().__init__(f"configuration: {count}{where}{lines}")
