"""Keys of the model that change numbers only: each against a computation of its own."""

from __future__ import annotations

import math

import pytest
import torch

from hg_scale.config.schema import ModelConfig
from hg_scale.model.attention import Attention
from hg_scale.model.block import FeedForward, make_norm
from hg_scale.model.context import Context
from hg_scale.model.hourglass import Hourglass
from hg_scale.model.initialization import initialize_weights
from hg_scale.model.layers import PlainLayers
from hg_scale.model.plan import model_levels
from hg_scale.model.positions import rotate

SIZES = {"hierarchy": "1@1 1@2 1@1", "d_model": 16, "heads": 2, "d_ff": 32, "vocab_size": 64,
         "sequence_length": 12, "positions": "rotary"}  # fmt: skip


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_norms_add_norm_eps_to_the_variance(norm: str, eps: float) -> None:
    model = ModelConfig(**SIZES, norm=norm, norm_eps=eps)
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)) + 1
    centred = x - x.mean(-1, keepdim=True) if norm == "layernorm" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    module = make_norm(model, 16)
    with torch.no_grad():
        module.weight.fill_(1)
        if norm == "layernorm":
            module.bias.zero_()
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", [10_000.0, 500_000.0])
@pytest.mark.parametrize("tokens_per_position", [1, 3])
def test_rotary_positions_turn_pairs_by_powers_of_the_base(
    base: float, tokens_per_position: int
) -> None:
    """Feature i and i + d/2 of position p turn by p x base^(-2i/d) (RoFormer, equation 15)."""
    n, d = 7, 8
    x = torch.randn(1, 1, n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.empty_like(x)
    for p in range(n):
        for i in range(d // 2):
            angle = p * tokens_per_position * base ** (-2 * i / d)
            a, b = x[0, 0, p, i], x[0, 0, p, i + d // 2]
            expected[0, 0, p, i] = a * math.cos(angle) - b * math.sin(angle)
            expected[0, 0, p, i + d // 2] = b * math.cos(angle) + a * math.sin(angle)
    turned = rotate(x.float(), tokens_per_position, base).double()
    torch.testing.assert_close(turned, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_rotation_is_the_rotation_back() -> None:
    """A rotation R keeps products: the gradient of (R x) . (R y) with respect to x is y."""
    x, y = torch.randn(2, 1, 1, 7, 8, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    (rotate(x, 3, 100.0) * rotate(y, 3, 100.0)).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, y, rtol=1e-5, atol=1e-5)


def test_swiglu_activates_the_gate() -> None:
    """Shazeer 2020 (arXiv 2002.05202), equation 6; gates and up projections alternate."""
    model = ModelConfig(**SIZES, activation="swiglu", bias=False)
    module = FeedForward(model, PlainLayers(), model_levels(model)[0])
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
        gate, up = (x @ module.up.weight[part::2].T for part in (0, 1))
        expected = (gate * gate.sigmoid() * up) @ module.down.weight.T
        torch.testing.assert_close(module(x, Context(())), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_qk_norm_adds_norm_eps_to_the_mean_square(eps: float) -> None:
    model = ModelConfig(**SIZES, qk_norm=True, norm_eps=eps, bias=False)
    module = Attention(model, PlainLayers(), model_levels(model)[0])
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        q, k, v = (x @ module.qkv.weight.T).unflatten(2, (2, 3, 8)).transpose(1, 2).unbind(3)
        q, k = (t / (t.square().mean(-1, keepdim=True) + eps).sqrt() for t in (q, k))
        q, k = (
            rotate(t * s[:, None], 1, 10_000.0)
            for t, s in ((q, module.q_scale), (k, module.k_scale))
        )
        scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ module.out.weight.T
        torch.testing.assert_close(module(x, Context(()), 1), y, rtol=1e-4, atol=1e-5)


def logits(**changes: object) -> torch.Tensor:
    model = ModelConfig(**(SIZES | changes))
    hourglass = Hourglass(model)
    initialize_weights(list(hourglass.named_parameters()), model, seed=1)
    ids = torch.arange(24).view(2, 12) % 64
    with torch.no_grad():
        return hourglass(ids)


@pytest.mark.parametrize(
    "change",
    [{"rotary_base": 500.0}, {"norm_eps": 0.3}, {"norm": "rmsnorm", "norm_eps": 0.3},
     {"qk_norm": True}, {"window": [3, None]}],
)  # fmt: skip
def test_the_model_uses_the_key(change: dict[str, object]) -> None:
    base = {"norm": change["norm"]} if "norm" in change else {}
    assert (logits(**change) - logits(**base)).abs().max() > 1e-3
