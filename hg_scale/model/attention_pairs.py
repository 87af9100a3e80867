"""How many scores attention computes, as `attention.py` chooses its implementation. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hg_scale.config.constants import BANDED_BLOCK_BYTES, BANDED_MAX_KEYS

# Queries, and keys, of a tile of a fused kernel on CUDA, which skips a tile that is all masked:
# Dao 2023 (arXiv 2307.08691), section 3.1.
_FUSED_TILE = 128


@dataclass(frozen=True)
class Kernels:
    """What `attention.py` chooses its implementation by, besides the model.

    drops: whether the model's dropout is active, as in training.
    """

    device: Literal["cpu", "cuda"] = "cuda"
    precision: Literal["fp32", "bf16"] = "bf16"
    drops: bool = True

    @property
    def block(self) -> int:
        """Queries of a block of `banded.py`."""
        return BANDED_BLOCK_BYTES // (4 if self.precision == "fp32" else 2)


@dataclass(frozen=True)
class Pairing:
    """Attention of n queries to m keys.

    Query i is at position i * query_step, key j at j * key_step of the longer sequence.
    `crosses`: between two levels. `window`: of the level; None: full.
    """

    n: int
    m: int
    query_step: int = 1
    key_step: int = 1
    crosses: bool = False
    window: int | None = None

    @property
    def width(self) -> int:
        """Keys that a query may see: of its window, or all."""
        return min(self.window or self.m, self.m)

    @property
    def distances(self) -> int:
        """Relative distances of queries and keys."""
        return self.width if self.width < self.m else max(self.n, self.m)

    def visible(self) -> int:
        """Return how many pairs of query and key the causal mask leaves."""
        if self.query_step > 1:  # query i sees the members of groups 0 .. i
            return self.query_step * _triangle(self.n)
        if self.key_step > 1:  # query i sees groups 0 .. floor(i / k)
            groups, rest = divmod(self.n, self.key_step)
            return self.key_step * _triangle(groups) + rest * (groups + 1)
        return _triangle(self.width) + (self.n - self.width) * self.width


@dataclass(frozen=True)
class ExecutedPairs:
    """Scores that are computed: of contents, and of relative distances from a table.

    fused: by a kernel that computes the scores again in its backward pass.
    """

    contents: int
    by_distance: int
    table: int  # distances in the table
    fused: bool = False


def executed_pairs(
    pairing: Pairing, relative: bool, dropout: bool, kernels: Kernels
) -> ExecutedPairs:
    """Return what `Attention._attend_all` computes for a pairing.

    dropout: whether the model has any.
    """
    n, m = pairing.n, pairing.m
    explicit = relative or (dropout and kernels.drops)
    window = pairing.window if pairing.window and pairing.window < n else None
    on_cpu = kernels.device == "cpu" and min(window or n, n) <= BANDED_MAX_KEYS
    if not pairing.crosses and not explicit and on_cpu:
        return ExecutedPairs(_blocks(n, kernels.block, window), 0, 0)
    if window is not None:
        blocks = -(-n // window)
        count = blocks * window * 2 * window
        return ExecutedPairs(count, count, 2 * window, fused=not explicit)
    if explicit:
        by_distance = n * (n if pairing.key_step > 1 else m)
        return ExecutedPairs(n * m, by_distance, n if pairing.key_step > 1 else m)
    if pairing.crosses:
        return ExecutedPairs(n * m, 0, 0, fused=True)
    return ExecutedPairs(_blocks(n, _FUSED_TILE), 0, 0, fused=True)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def _blocks(n: int, block: int, window: int | None = None) -> int:
    """Count the pairs of blocks of queries with the keys that any query of the block sees."""
    total = 0
    for start in range(0, n, block):
        stop = min(n, start + block)
        total += (stop - start) * (stop - (max(0, start - window + 1) if window else 0))
    return total
