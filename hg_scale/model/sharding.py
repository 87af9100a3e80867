"""Which slice of a whole parameter a rank holds under tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor


@dataclass(frozen=True)
class TensorShard:
    """Slice `index` of `count` equal ones along dimension `dim`; dim None: held whole."""

    dim: int | None = None
    index: int = 0
    count: int = 1

    def take(self, whole: Tensor) -> Tensor:
        """This slice of the whole tensor (a view)."""
        return whole if self.dim is None else whole.chunk(self.count, self.dim)[self.index]

    def whole_shape(self, local: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the whole parameter from the shape of this slice."""
        return tuple(n * self.count if d == self.dim else n for d, n in enumerate(local))


WHOLE = TensorShard()
P = TypeVar("P", bound=Tensor)


def mark(parameter: P, shard: TensorShard) -> P:
    """Note on a parameter which slice it is, in our words and in Megatron's.

    DeepSpeed reads `tensor_model_parallel` to count replicated parameters once in norms.
    """
    parameter.shard = shard  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = shard.dim is not None  # type: ignore[attr-defined]
    parameter.partition_dim = -1 if shard.dim is None else shard.dim  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]
    return parameter


def shard_of(parameter: Tensor) -> TensorShard:
    """The slice noted on a parameter; unmarked ones are whole."""
    return getattr(parameter, "shard", WHOLE)
