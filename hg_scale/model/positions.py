"""Positional encodings: rotary embeddings, and sinusoids for Transformer-XL's relative scores."""

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
    """Return cosines and sines (n, d_head / 2) of positions 0, step, 2 step, ..."""
    with torch.inference_mode(False):  # cached: training could not use an inference tensor
        return _rotary_table(n, step, d_head, base, device, dtype)


def _rotary_table(
    n: int, step: int, d_head: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    frequencies = base ** (-torch.arange(0, d_head, 2, device=device, dtype=torch.float64) / d_head)
    angles = torch.arange(n, device=device, dtype=torch.float64)[:, None] * step * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, step: int, base: float, start: int | Tensor = 0) -> Tensor:
    """Rotate each pair of features of x (B, heads, n, d_head) by its position.

    Positions are `start`, `start` + `step`, ...; start is a multiple of `step`, and a tensor (B,)
    if it differs between sequences. Feature c is paired with feature c + d_head / 2, as in the
    authors' code.
    """
    n, table_args = x.shape[2], (step, x.shape[3], base, x.device, x.dtype)
    if isinstance(start, Tensor):
        index = start[:, None] // step + torch.arange(n, device=x.device)
        table = rotary_table(_next_power_of_two(int(index.max()) + 1), *table_args)
        cos, sin = (t[index][:, None] for t in table)  # (B, 1, n, d_head / 2)
    elif start:
        first = start // step
        table = rotary_table(_next_power_of_two(first + n), *table_args)
        cos, sin = (t.narrow(0, first, n) for t in table)
    else:
        cos, sin = rotary_table(n, *table_args)
    if not torch.is_grad_enabled():
        return _apply_rotation(x, cos, sin)
    return cast(Tensor, _Rotation.apply(x, cos, sin))


def _next_power_of_two(n: int) -> int:
    """Return the smallest power of two >= n, so that few tables serve growing sequences."""
    return 1 << (n - 1).bit_length()


class _Rotation(torch.autograd.Function):
    """The rotation in four passes over memory each way; autograd would take twice as many."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _apply_rotation(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _apply_rotation(gradient, cos, -sin), None, None


def _apply_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Map the two halves (a, b) of the last dimension to (a cos - b sin, b cos + a sin)."""
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    (a, b), (rotated_a, rotated_b) = x.chunk(2, -1), result.chunk(2, -1)
    torch.mul(a, cos, out=rotated_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=rotated_b).addcmul_(a, sin)
    return result


@lru_cache(maxsize=64)
def sinusoids(
    first: int, count: int, step: int, d: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return (count, d): sines, then cosines, of the signed distances first, first + step, ...

    Frequencies are 10000^(-2a/d), a = 0 .. d/2 - 1.
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
    """Convert scores by distance to scores by key: out[i, j] = scores[i, j - k i + k (n - 1)].

    scores: (..., n, R); out: (..., n, R), unspecified where the index leaves 0 .. R - 1. This is
    Transformer-XL's pad-and-reshape trick with steps of k: the padding is the only copy.
    """
    n, distances = scores.shape[-2:]
    flat = F.pad(scores, (k, 0)).flatten(-2)
    return flat[..., n * k :].unflatten(-1, (n, distances))
