"""Closed-form costs equal those of the module."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hg_scale.config.schema import ModelConfig
from hg_scale.model.costs import (
    forward_flops,
    layer_costs,
    parameter_count,
    training_flops_per_token,
)
from hg_scale.model.hourglass import Hourglass

SHAPES = {
    "2@1": 1,
    "1@1 2@3 2@1": 2,
    "0@1 1@1 1@1": 2,
    "1@1 1@2 2@4 1@2 1@1": 3,
    "1@1 1@2 1@4 1@12 1@4 1@2 0@1": 4,
}


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Draw any valid combination of the keys that change parameters."""
    hierarchy = draw(st.sampled_from(list(SHAPES)))
    levels = SHAPES[hierarchy]
    equal = draw(st.booleans())
    widths = [16] * levels if equal else [8 * (2 + i) for i in range(levels)]
    positions = draw(st.lists(st.sampled_from(["relative", "rotary"]), min_size=levels,
                              max_size=levels))  # fmt: skip
    shared = equal and "relative" in positions and draw(st.booleans())
    return ModelConfig(
        hierarchy=hierarchy,
        d_model=widths,
        heads=[2] * levels,
        d_ff=[24] * levels,
        vocab_size=draw(st.integers(5, 70)),
        sequence_length=48,
        window=draw(st.sampled_from([None, 5])),
        pooling=draw(st.sampled_from(["average", "linear", "attention", "attention+linear"])),
        upsampling=draw(
            st.sampled_from(["repeat", "linear", "attention", "attention+linear", "attention+none"])
        ),
        positions=positions,
        shared_position_bias=shared,
        norm=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        activation=draw(st.sampled_from(["gelu", "swiglu"])),
        qk_norm=draw(st.booleans()),
        bias=draw(st.booleans()),
        skip=draw(st.sampled_from(["add", "learned"])),
    )


@settings(max_examples=150, deadline=None)
@given(models())
def test_parameter_counts_equal_the_modules(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Hourglass(config, seed=None)
    assert sum(p.numel() for p in model.parameters()) == parameter_count(config)
    by_layer = {cost.layer.name: cost.parameters for cost in layer_costs(config)}
    for name, count in by_layer.items():
        module = model.get_submodule(name)
        shared = {id(p) for p in (model.position_bias or torch.nn.Module()).parameters()}
        assert sum(p.numel() for p in module.parameters() if id(p) not in shared) == count, name


@settings(max_examples=30, deadline=None)
@given(models())
def test_model_runs_at_any_length(config: ModelConfig) -> None:
    model = Hourglass(config, seed=None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
        for length in (1, 7, 24):
            logits = model(torch.randint(0, config.vocab_size, (2, length)))
            assert logits.shape == (2, length, config.padded_vocab)
            assert torch.isfinite(logits).all()
            assert int(logits.argmax(-1).max()) < config.vocab_size  # padded logits are masked


def test_flops_equal_torchs_flop_counter() -> None:
    """Rotary, without windows: torch counts all products, including the full square of SDPA."""
    for hierarchy in ("3@1", "2@1 4@3 2@1", "1@1 1@2 2@4 1@2 1@1"):
        config = ModelConfig(
            hierarchy=hierarchy, positions="rotary", sequence_length=192, pooling="linear",
            upsampling="linear",
        )  # fmt: skip
        with torch.device("meta"):
            model = Hourglass(config, seed=None)
            ids = torch.zeros(1, 192, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(ids)
        assert counter.get_total_flops() == forward_flops(config)


def test_shortened_levels_are_cheaper() -> None:
    """At factor 3 the FLOPs of linear layers fall to a third and those of attention to a ninth."""
    flat = ModelConfig(hierarchy="12@1", positions="rotary", sequence_length=2049)
    short = ModelConfig(
        hierarchy="0@1 12@3 0@1", positions="rotary", pooling="average", upsampling="repeat",
        sequence_length=2049,
    )  # fmt: skip
    block = {c.layer.name: c.flops for c in layer_costs(flat)}["pre.0"]
    shortened = {c.layer.name: c.flops for c in layer_costs(short)}["level0.stack.0"]
    attention = 4 * 2049**2 * 512
    assert shortened * 9 == (block - attention) * 3 + attention


def test_shorten_factor_dropout_costs_the_mean_of_its_draws() -> None:
    def per_token(hierarchy: str, choices: list[int] | None = None) -> float:
        return training_flops_per_token(
            ModelConfig(
                hierarchy=hierarchy,
                sequence_length=60,
                pooling="attention",
                upsampling="attention",
                shorten_factor_choices=choices,
            )  # type: ignore[call-arg]
        )

    twos, threes = per_token("1@1 4@2 1@1"), per_token("1@1 4@3 1@1")
    assert per_token("1@1 4@2 1@1", [2, 3]) == (twos + threes) / 2
