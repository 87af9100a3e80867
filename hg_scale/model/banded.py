"""Causal attention on a CPU, full or in a sliding window, a block of queries at a time.

A block meets only the keys that some of its queries may see, as two plain matrix products: the
masked half of the square is never computed. torch's fused kernel for CPUs takes 1 to 2.5 times as
long, 1.9 to 4.8 times with a window given as a mask (`benchmarks/attention.py`). The price is
memory: the probabilities are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
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
            _hide(scores, rows, keys, window)
            probabilities = scores.softmax(-1)
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
            _add_product(dv[:, keys], probabilities.mT, dy[:, rows])
            dp = dy[:, rows] @ v[:, keys].mT
            ds = torch._softmax_backward_data(dp, probabilities, -1, dp.dtype)
            torch.bmm(ds, k[:, keys], out=dq[:, rows])
            _add_product(dk[:, keys], ds.mT, q[:, rows])
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _blocks(q: Tensor, window: int | None) -> Iterator[tuple[slice, slice]]:
    """The queries of each block, and the keys that any of them sees."""
    n, block = q.shape[1], BLOCK_BYTES // q.element_size()
    for start in range(0, n, block):
        stop = min(n, start + block)
        first = max(0, start - window + 1) if window else 0
        yield slice(start, stop), slice(first, stop)


def _hide(scores: Tensor, rows: slice, keys: slice, window: int | None) -> None:
    """Minus infinity where a query does not see a key: two corners of scores (.., rows, keys)."""
    size = scores.shape[1]
    scores[..., -size:] += _corner(size, scores.dtype)  # keys after the query
    if window and rows.stop > window:  # keys too far back for some query
        hidden = rows.stop - window - keys.start  # of the last query
        corner = torch.full((size, hidden), float("-inf"), dtype=scores.dtype)
        scores[..., :hidden] += corner.tril(hidden - size)


@lru_cache(maxsize=16)
def _corner(size: int, dtype: torch.dtype) -> Tensor:
    """(size, size): minus infinity above the diagonal, 0 on and below it."""
    with torch.inference_mode(False):
        return torch.full((size, size), float("-inf"), dtype=dtype).triu(1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without the product in memory where it has the type of the total."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += a @ b
