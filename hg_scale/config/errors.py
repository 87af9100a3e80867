"""What is wrong with a configuration, said in lines a person can act on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hg_scale.errors import UserError
from hg_scale.exit_codes import CONFIG_ERROR

_ABSENT = object()


def short_value(value: Any) -> str:
    """A value as a file spells it; lists and objects only as far as a line can hold them."""
    text = json.dumps(value, default=str)
    cut = isinstance(value, list | dict) and len(text) > 80
    return f"{text[:76]} ..." if cut else text


@dataclass(frozen=True)
class Problem:
    """One fault: the dotted `key` it is about, what was expected, what to do.

    `others` are further keys the fault depends on: when one of those is itself faulty, the fault
    may be an echo and is left out of the report.
    """

    key: str
    message: str
    value: Any = _ABSENT
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.value is _ABSENT:
            return f"{self.key}: {self.message}"
        return f"{self.key} = {short_value(self.value)}: {self.message}"


class ConfigError(UserError):
    """A configuration that cannot be used; `problems` lists every fault found.

    `advice` is further lines on what to do about them together.
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
