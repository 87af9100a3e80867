"""Resampling: its dropout, where the authors' code has it, and the learned skip."""

from __future__ import annotations

import pytest
import torch

from hg_scale.config.schema import ModelConfig
from hg_scale.model.block import Activations
from hg_scale.model.context import Context
from hg_scale.model.hourglass import Hourglass

TRAINING = Context((3,), key=(1, 1))


def model(dropout: float, **kinds: str) -> Hourglass:
    sizes = {"hierarchy": "0@1 0@3 0@1", "d_model": 16, "heads": 2, "d_ff": 32, "vocab_size": 64,
             "positions": "rotary", "sequence_length": 24}  # fmt: skip
    return Hourglass(ModelConfig(**(sizes | kinds), dropout=dropout))


def without_other_dropout(hourglass: Hourglass) -> Hourglass:
    hourglass.get_submodule("embedding").dropout.rate = 0.0
    return hourglass


@pytest.mark.parametrize(
    ("pooling", "upsampling", "drops"),
    [("linear", "repeat", True), ("average", "linear", True), ("average", "repeat", False)],
)
def test_linear_resampling_without_attention_has_dropout(
    pooling: str, upsampling: str, drops: bool
) -> None:
    with_dropout = without_other_dropout(model(0.5, pooling=pooling, upsampling=upsampling))
    plain = model(0.0, pooling=pooling, upsampling=upsampling)
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    trained = with_dropout(ids, context=TRAINING)
    assert torch.equal(trained, with_dropout(ids, context=TRAINING))
    assert torch.equal(trained, plain(ids)) is not drops
    assert torch.equal(with_dropout(ids), plain(ids))  # evaluation


@pytest.mark.parametrize("name", ["shorten", "upsample"])
def test_dropout_follows_the_linear_layer(name: str) -> None:
    """A quarter of its outputs is 0, the rest is scaled by 4/3."""
    hourglass = model(0.25, pooling="linear", upsampling="linear")
    layer = hourglass.get_submodule(f"level0.{name}")
    linear = layer.get_submodule("pool" if name == "shorten" else "expand")
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.fill_(3.0)
    seen: list[torch.Tensor] = []
    if name == "upsample":
        layer.get_submodule("norm").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.zeros(4, 300, 16)
    state = Activations(torch.zeros(4, 100, 16), (x,)) if name == "upsample" else Activations(x)
    result = layer(state, TRAINING)
    values = seen[0] if seen else result.x
    assert values.unique().tolist() == pytest.approx([0.0, 4.0])
    assert float((values == 0).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_resampling_that_attends_drops_after_its_attention_only() -> None:
    """The authors' code passes no dropout to the linear layer inside."""
    hourglass = model(0.5, pooling="attention+linear", upsampling="attention+linear")
    for name in ("shorten", "upsample"):
        layer = hourglass.get_submodule(f"level0.{name}")
        assert layer.dropout.rate == 0.0 and layer.attend.dropout_attention.rate == 0.5


def test_the_learned_gain_scales_the_skip_only() -> None:
    upsample = model(0.0, skip="learned", upsampling="repeat").get_submodule("level0.upsample")
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 24, 16, generator=generator), torch.randn(2, 8, 16, generator=generator)
    gain = torch.randn(16, generator=generator)
    with torch.no_grad():
        plain = upsample(Activations(z, (x,)), Context((3,))).x
        upsample.gain.copy_(gain)
        scaled = upsample(Activations(z, (x,)), Context((3,))).x
    torch.testing.assert_close(scaled - plain, x * (gain - 1), rtol=1e-4, atol=1e-5)
