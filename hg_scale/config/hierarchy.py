"""The paper's notation for a hierarchy: `2@1 1@2 4@4 1@2 2@1`.

`n@f` is n blocks on a sequence shortened by the *total* factor f. The first and the last entry are
the full-length blocks before and after the shortened part and may differ; between them is a
palindrome whose factors grow towards the middle, each a multiple of the one before (arXiv
2110.13711, section 3; the parser of the authors' code). A single entry `n@1` is a flat Transformer.

A *level* is an index into the by-level lists of the configuration: 0 is the full length, level
j + 1 is the sequence that the j-th shortening makes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import mul

_ENTRY = re.compile(r"(\d{1,12})@(\d{1,12})")
MAX_BLOCKS, MAX_LEVELS = 1000, 32
_EXAMPLE = "write it like '2@1 8@3 2@1'"


@dataclass(frozen=True)
class Shortening:
    """One shortening: `blocks` at total factor `factor`, entered by the step `k`.

    The deepest one has its `blocks` in one stack; any other has `blocks` on the way down and as
    many on the way up.
    """

    factor: int
    k: int
    blocks: int


@dataclass(frozen=True)
class Hierarchy:
    """A parsed hierarchy; `shortenings` are listed outermost first."""

    pre: int
    post: int | None  # None: a flat model, which has one stack only
    shortenings: tuple[Shortening, ...]

    @classmethod
    def parse(cls, text: str) -> Hierarchy:
        """Read the notation. Raises ValueError with a one-line remedy."""
        entries = []
        for word in text.split():
            match = _ENTRY.fullmatch(word)
            if not match:
                raise ValueError(f"'{word}' is not of the form blocks@factor; {_EXAMPLE}")
            entries.append((int(match[1]), int(match[2])))
        if not entries:
            raise ValueError(f"it is empty; {_EXAMPLE}")
        if (blocks := sum(blocks for blocks, _ in entries)) > MAX_BLOCKS:
            raise ValueError(f"{blocks:,} blocks are too many; at most {MAX_BLOCKS:,}")
        if len(entries) > 2 * MAX_LEVELS + 1:
            raise ValueError(f"{len(entries)} entries are too many; at most {2 * MAX_LEVELS + 1}")
        if entries[0][1] != 1 or entries[-1][1] != 1:
            raise ValueError(f"the first and the last entry must have factor 1; {_EXAMPLE}")
        if len(entries) == 1:
            if entries[0][0] == 0:
                raise ValueError("a flat model needs at least one block, as in '6@1'")
            return cls(entries[0][0], None, ())
        inner = entries[1:-1]
        if len(inner) % 2 == 0 or inner != inner[::-1]:
            raise ValueError(
                "the entries between the first and the last must read the same both ways, "
                f"around one deepest entry; {_EXAMPLE}"
            )
        shortenings, above = [], 1
        for blocks, factor in inner[: len(inner) // 2 + 1]:
            if factor == 0 or factor % above:
                raise ValueError(f"factor {factor} is not a multiple of the {above} above it")
            shortenings.append(Shortening(factor, factor // above, blocks))
            above = factor
        return cls(entries[0][0], entries[-1][0], tuple(shortenings))

    @property
    def level_count(self) -> int:
        """Number of levels: one more than there are shortenings."""
        return len(self.shortenings) + 1

    @cached_property
    def factors(self) -> tuple[int, ...]:
        """The step factor k of each shortening, outermost first."""
        return tuple(shortening.k for shortening in self.shortenings)

    @property
    def total_factor(self) -> int:
        """The factor of the deepest level."""
        return self.shortenings[-1].factor if self.shortenings else 1

    @property
    def blocks(self) -> int:
        """Transformer blocks of the model, not counting those that resample."""
        inner = sum(2 * shortening.blocks for shortening in self.shortenings[:-1])
        deepest = self.shortenings[-1].blocks if self.shortenings else 0
        return self.pre + (self.post or 0) + inner + deepest


def level_factors(factors: tuple[int, ...]) -> tuple[int, ...]:
    """Total factor of every level from the step factors: (3, 2) -> (1, 3, 6)."""
    return tuple(accumulate(factors, mul, initial=1))


def level_lengths(length: int, factors: tuple[int, ...]) -> tuple[int, ...]:
    """Positions at every level for a sequence of `length` tokens: each step rounds up."""
    return tuple(accumulate(factors, lambda n, k: -(-n // k), initial=length))
