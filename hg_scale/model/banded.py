"""Causal attention on a CPU, full or in a sliding window, one block of queries at a time.

A block is multiplied with the keys that any of its queries sees, in two plain matrix products, so
that the masked half of the scores is never computed. torch's fused kernel for CPUs takes 1 to 2.5
times as long, and 1.9 to 4.8 times with a window given as a mask (`benchmarks/attention.py`). The
price is memory: the probabilities are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from hg_scale.config.constants import BANDED_BLOCK_BYTES, BANDED_MAX_KEYS


def is_preferred(q: Tensor, window: int | None) -> bool:
    """Whether this implementation is the fastest for queries (B, heads, n, d_head)."""
    return q.device.type == "cpu" and min(window or q.shape[2], q.shape[2]) <= BANDED_MAX_KEYS


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Attend from query i to keys i - window + 1 .. i (None: 0 .. i); all (B, heads, n, d_head)."""
    shape = q.shape
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    return cast(Tensor, _Banded.apply(q * shape[-1] ** -0.5, k, v, window)).view(shape)


class _Banded(torch.autograd.Function):
    """`attention` for (B * heads, n, d_head), q scaled; gradients accumulate in fp32 or wider."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        y, saved = torch.empty_like(q), []
        for queries, keys in _blocks(q, window):
            scores = q[:, queries] @ k[:, keys].mT
            _mask(scores, queries, keys, window)
            probabilities = scores.softmax(-1)
            torch.bmm(probabilities, v[:, keys], out=y[:, queries])
            saved.append(probabilities)
        ctx.window = window
        ctx.save_for_backward(q, k, v, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *saved = ctx.saved_tensors
        dq = torch.empty_like(q)
        wide = torch.promote_types(q.dtype, torch.float32)
        dk, dv = (torch.zeros_like(t, dtype=wide) for t in (k, v))
        blocks = zip(_blocks(q, ctx.window), saved, strict=True)
        for (queries, keys), probabilities in blocks:
            _add_product(dv[:, keys], probabilities.mT, dy[:, queries])
            dp = dy[:, queries] @ v[:, keys].mT
            ds = torch._softmax_backward_data(dp, probabilities, -1, dp.dtype)
            torch.bmm(ds, k[:, keys], out=dq[:, queries])
            _add_product(dk[:, keys], ds.mT, q[:, queries])
        return dq, dk.to(k.dtype), dv.to(v.dtype), None


def _blocks(q: Tensor, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Yield the queries of each block, and the keys that any of them sees."""
    n, block = q.shape[1], BANDED_BLOCK_BYTES // q.element_size()
    for start in range(0, n, block):
        stop = min(n, start + block)
        first = max(0, start - window + 1) if window else 0
        yield slice(start, stop), slice(first, stop)


def _mask(scores: Tensor, queries: slice, keys: slice, window: int | None) -> None:
    """Set invisible keys to minus infinity, in place: two corners of scores (.., queries, keys)."""
    size = scores.shape[1]
    scores[..., -size:] += _corner(size, scores.dtype)  # keys after the query
    if window and queries.stop > window:  # keys before the window of some query
        masked = queries.stop - window - keys.start  # for the last query
        corner = torch.full((size, masked), float("-inf"), dtype=scores.dtype)
        scores[..., :masked] += corner.tril(masked - size)


@lru_cache(maxsize=16)
def _corner(size: int, dtype: torch.dtype) -> Tensor:
    """Return (size, size): minus infinity above the diagonal, 0 on and below it."""
    with torch.inference_mode(False):  # cached: training could not use an inference tensor
        return torch.full((size, size), float("-inf"), dtype=dtype).triu(1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute total += a @ b; without a temporary for the product where the dtypes are equal."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += a @ b
