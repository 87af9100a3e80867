"""The description of one planted fault."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """Replace `old`, which `file` contains exactly once, by `new`: a fault, or an `equivalent`.

    `tests`: pytest's arguments, of which at least one test must fail. `equivalent`: why no test
    can notice; empty for a fault.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    equivalent: str = ""
