"""Banded attention equals the definition and the fused kernel, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hg_scale.config.schema import ModelConfig
from hg_scale.model import banded
from hg_scale.model.attention import Attention
from hg_scale.model.context import Context
from hg_scale.model.layers import PlainLayers
from hg_scale.model.plan import model_levels


def by_definition(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    n = q.shape[2]
    distance = torch.arange(n)[:, None] - torch.arange(n)
    masked = (distance < 0) | (distance >= (window or n))
    scores = (q @ k.mT) / q.shape[3] ** 0.5
    return scores.masked_fill(masked, float("-inf")).softmax(-1) @ v


def with_gradients(attend, inputs: list[Tensor], dy: Tensor, window: int | None) -> list[Tensor]:
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = attend(*inputs, window)
    y.backward(dy)
    return [y.detach(), *(t.grad for t in inputs)]


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 200), window=st.none() | st.integers(1, 220), seed=st.integers(0, 99))
def test_banded_attention_equals_the_definition(n: int, window: int | None, seed: int) -> None:
    """In float64 a block has 32 queries: several blocks, and incomplete last ones."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, n, 4)
    q, k, v, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
    actual = with_gradients(banded.attention, [q, k, v], dy, window)
    expected = with_gradients(by_definition, [q, k, v], dy, window)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [None, 100])
def test_bf16_error_is_that_of_the_definition(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn((1, 2, 700, 64), generator=generator) for _ in range(4))
    exact = with_gradients(by_definition, [q, k, v], dy, window)

    def error(attend) -> list[float]:
        low = with_gradients(attend, [t.bfloat16() for t in (q, k, v)], dy.bfloat16(), window)
        return [float((a - b).square().mean().sqrt()) for a, b in zip(low, exact, strict=True)]

    for actual, plain in zip(error(banded.attention), error(by_definition), strict=True):
        assert actual < 1.1 * plain


@pytest.mark.parametrize("window", [None, 7, 64])
@pytest.mark.parametrize("norm", [True, False])
def test_equals_the_fused_kernel(monkeypatch: pytest.MonkeyPatch, window: int, norm: bool) -> None:
    """A GPU uses torch's fused kernel, for all keys at once or in blocks of one window."""
    model = ModelConfig(
        hierarchy="1@1", d_model=32, heads=2, d_ff=32, positions="rotary", window=window,
        qk_norm=norm, sequence_length=150,
    )  # fmt: skip
    attention = Attention(model, PlainLayers(), model_levels(model)[0])
    x = torch.randn((2, 150, 32), generator=torch.Generator().manual_seed(1))
    results = []
    for preferred in (True, False):
        monkeypatch.setattr(banded, "is_preferred", lambda *_, value=preferred: value)
        attention.zero_grad()
        y = attention(x, Context(()), 1)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in attention.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
