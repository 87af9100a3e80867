"""Which slice of an unsharded parameter a rank holds under tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor


@dataclass(frozen=True)
class TensorShard:
    """Slice `index` of `count` equal ones along dimension `dim`; dim None: not sharded."""

    dim: int | None = None
    index: int = 0
    count: int = 1

    def slice_of(self, unsharded: Tensor) -> Tensor:
        """Return this slice of the unsharded tensor, as a view."""
        return unsharded if self.dim is None else unsharded.chunk(self.count, self.dim)[self.index]

    def unsharded_shape(self, local: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the unsharded parameter from the shape of this slice."""
        return tuple(n * self.count if d == self.dim else n for d, n in enumerate(local))


_UNSHARDED = TensorShard()
_P = TypeVar("_P", bound=Tensor)


def mark_shard(parameter: _P, shard: TensorShard) -> _P:
    """Record on a parameter which slice it is, for this package and as Megatron does.

    DeepSpeed reads `tensor_model_parallel` to count replicated parameters once in norms.
    """
    parameter.shard = shard  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = shard.dim is not None  # type: ignore[attr-defined]
    parameter.partition_dim = -1 if shard.dim is None else shard.dim  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]
    return parameter


def shard_of(parameter: Tensor) -> TensorShard:
    """Return the slice recorded on a parameter; a parameter without a record is not sharded."""
    return getattr(parameter, "shard", _UNSHARDED)
