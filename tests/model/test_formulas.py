"""Keys of the model that change numbers only: each against a computation of its own."""

from __future__ import annotations

import math

import pytest
import torch

from hg_scale.config.schema import ModelConfig
from hg_scale.model.block import make_norm
from hg_scale.model.hourglass import Hourglass
from hg_scale.model.initialization import initialize_weights
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
