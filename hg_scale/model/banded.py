"""Causal attention on a CPU, full or in a sliding window, a block of queries at a time.

A block meets only the keys that some of its queries may see, as two plain matrix products: the
masked half of the square is never computed. torch's fused kernel for CPUs takes 1 to 1.8 times as
long, 2 to 4 times with a window given as a mask (`benchmarks/attention.py`). The price is memory:
the probabilities are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

BLOCK_BYTES = 256  # queries of a block times bytes of an element: 128 in bf16, 64 in fp32
LONGEST = 4096  # keys a query sees, past which the probabilities take too much memory


def suits(q: Tensor, window: int | None) -> bool:
    """Whether this is the faster way for queries (B, heads, n, d_head)."""
    return q.device.type == "cpu" and min(window or q.shape[2], q.shape[2]) <= LONGEST


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Query i over keys i - window + 1 .. i (None: 0 .. i); all (B, heads, n, d_head)."""
    shape = q.shape
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return cast(Tensor, _Banded.apply(q * shape[-1] ** -0.5, k, v, window)).view(shape)


class _Banded(torch.autograd.Function):
    """The same for (B * heads, n, d_head), q scaled; its derivative adds up in fp32 or wider."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        y, kept = torch.empty_like(q), []
        for rows, keys in _blocks(q, window):
            scores = q[:, rows] @ k[:, keys].mT
            probabilities = scores.add_(_mask(rows, keys, window, q.dtype)).softmax(-1)
            torch.bmm(probabilities, v[:, keys], out=y[:, rows])
            kept.append(probabilities)
        ctx.window = window
        ctx.save_for_backward(q, k, v, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *kept = ctx.saved_tensors
        dq = torch.empty_like(q)
        wide = torch.promote_types(q.dtype, torch.float32)
        dk, dv = (torch.zeros_like(t, dtype=wide) for t in (k, v))
        blocks = zip(_blocks(q, ctx.window), kept, strict=True)
        for (rows, keys), probabilities in blocks:
            dv[:, keys] += probabilities.mT @ dy[:, rows]
            dp = dy[:, rows] @ v[:, keys].mT
            ds = torch._softmax_backward_data(dp, probabilities, -1, dp.dtype)
            torch.bmm(ds, k[:, keys], out=dq[:, rows])
            dk[:, keys] += ds.mT @ q[:, rows]
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _blocks(q: Tensor, window: int | None) -> Iterator[tuple[slice, slice]]:
    """The queries of each block, and the keys that any of them sees."""
    n, block = q.shape[1], BLOCK_BYTES // q.element_size()
    for start in range(0, n, block):
        stop = min(n, start + block)
        first = max(0, start - window + 1) if window else 0
        yield slice(start, stop), slice(first, stop)


def _mask(rows: slice, keys: slice, window: int | None, dtype: torch.dtype) -> Tensor:
    """(rows, keys): 0 where a query sees a key, minus infinity elsewhere."""
    distance = torch.arange(rows.start, rows.stop)[:, None] - torch.arange(keys.start, keys.stop)
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    return torch.zeros(distance.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
