"""Kinds of resampling: how a sequence is shortened (pooling) and expanded again (upsampling)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Pooling = Literal["average", "linear", "attention+average", "attention+linear"]
Upsampling = Literal["repeat", "linear", "attention+repeat", "attention+linear", "attention+none"]

POOLING_SHORTHAND = {"attention": "attention+average"}
UPSAMPLING_SHORTHAND = {"attention": "attention+repeat"}


@dataclass(frozen=True)
class ResamplingKind:
    """A parsed pooling or upsampling.

    `base` computes the new positions: average or linear; repeat, linear or none. `attends`: they
    then attend to the sequence before the resampling, followed by a feed-forward.
    """

    attends: bool
    base: str

    @classmethod
    def parse(cls, text: str) -> ResamplingKind:
        """Read a `Pooling` or an `Upsampling`."""
        attention, _, base = text.rpartition("+")
        return cls(bool(attention), base)

    @property
    def has_fixed_factor(self) -> bool:
        """Whether the shape of its weights depends on the shortening factor."""
        return self.base == "linear"
