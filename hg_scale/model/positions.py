"""Where a position is: rotary embeddings, and the sinusoids of Transformer-XL's relative scores."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F


@lru_cache(maxsize=64)
def rotary_table(
    n: int, step: int, d_head: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (n, d_head / 2) of positions 0, step, 2 step, ..."""
    with torch.inference_mode(False):  # kept: what inference makes, training could not use
        return _rotary_table(n, step, d_head, base, device, dtype)


def _rotary_table(
    n: int, step: int, d_head: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    frequencies = base ** (-torch.arange(0, d_head, 2, device=device, dtype=torch.float64) / d_head)
    angles = torch.arange(n, device=device, dtype=torch.float64)[:, None] * step * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, step: int, base: float, start: int | Tensor = 0) -> Tensor:
    """Turn each pair of features of x (B, heads, n, d_head) by its position.

    Positions are `start`, `start` + `step`, ...; start, a multiple of `step`, may differ by row,
    (B,). Feature c is paired with feature c + d_head / 2, as in the authors' code.
    """
    n, kind = x.shape[2], (step, x.shape[3], base, x.device, x.dtype)
    if isinstance(start, Tensor):
        places = start[:, None] // step + torch.arange(n, device=x.device)
        table = rotary_table(_room(int(places.max()) + 1), *kind)
        cos, sin = (t[places][:, None] for t in table)  # (B, 1, n, d_head / 2)
    elif start:
        first = start // step
        cos, sin = (t.narrow(0, first, n) for t in rotary_table(_room(first + n), *kind))
    else:
        cos, sin = rotary_table(n, *kind)
    if not torch.is_grad_enabled():
        return turn(x, cos, sin)
    return cast(Tensor, _Rotation.apply(x, cos, sin))


def _room(n: int) -> int:
    """The power of two from n on: few tables serve sequences that grow."""
    return 1 << (n - 1).bit_length()


class _Rotation(torch.autograd.Function):
    """Four passes over the input each way; autograd's own derivative takes twice as many."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return turn(gradient, cos, -sin), None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin), a and b the two halves of the last dimension."""
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    (a, b), (turned_a, turned_b) = x.chunk(2, -1), result.chunk(2, -1)
    torch.mul(a, cos, out=turned_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=turned_b).addcmul_(a, sin)
    return result


@lru_cache(maxsize=64)
def sinusoids(
    first: int, count: int, step: int, d: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(count, d): sines, then cosines, of the signed distances first, first + step, ...

    Frequencies 10000^(-2a/d), a = 0 .. d/2 - 1.
    """
    with torch.inference_mode(False):
        return _sinusoids(first, count, step, d, device, dtype)


def _sinusoids(
    first: int, count: int, step: int, d: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    distances = first + step * torch.arange(count, device=device, dtype=torch.float64)
    a = torch.arange(d // 2, device=device, dtype=torch.float64)
    angles = distances[:, None] * 10_000 ** (-2 * a / d)
    return torch.cat((angles.sin(), angles.cos()), -1).to(dtype)


def relative_shift(scores: Tensor, k: int) -> Tensor:
    """Scores by distance to scores by key: out[i, j] = scores[i, j - k i + k (n - 1)].

    scores: (..., n, R); out: (..., n, R), unspecified where the index leaves 0 .. R - 1. It is the
    pad-and-reshape trick of Transformer-XL, with steps of k: no copy but the padding.
    """
    n, distances = scores.shape[-2:]
    flat = F.pad(scores, (k, 0)).flatten(-2)
    return flat[..., n * k :].unflatten(-1, (n, distances))
