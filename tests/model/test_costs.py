"""Closed-form costs equal those of the module."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from hg_scale.config.schema import ModelConfig
from hg_scale.model.attention_pairs import Kernels, Pairing
from hg_scale.model.context import Context
from hg_scale.model.costs import (
    causal_flops_per_token,
    executed_flops_per_token,
    forward_flops,
    layer_costs,
    parameter_count,
    training_flops_per_token,
)
from hg_scale.model.grouping import FixedGroups
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


def _baddbmm_flops(_: list[int], a: list[int], b: list[int], **__: object) -> int:
    return 2 * a[0] * a[1] * a[2] * b[2]


def _fused_flops(q: list[int], k: list[int], v: list[int], *_: object, **__: object) -> int:
    return sdpa_flop_count(q, k, v)


def _fused_backward_flops(
    dy: list[int], q: list[int], k: list[int], v: list[int], *_: object, **__: object
) -> int:
    return sdpa_backward_flop_count(dy, q, k, v)


aten = torch.ops.aten
NOT_IN_TORCHS_COUNTER = {
    aten.baddbmm_: _baddbmm_flops,  # of banded.py
    aten._scaled_dot_product_flash_attention_for_cpu: _fused_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _fused_backward_flops,
}


@settings(max_examples=60, deadline=None)
@given(
    config=models(),
    length=st.sampled_from([48, 150]),
    dropout=st.sampled_from([0.0, 0.1]),
    drops=st.booleans(),
    recompute=st.booleans(),
    precision=st.sampled_from(["fp32", "bf16"]),
)
def test_executed_flops_equal_a_count_over_the_module(
    config: ModelConfig, length: int, dropout: float, drops: bool, recompute: bool, precision: str
) -> None:
    """To the operation: forward, recomputation and backward, on every path of a CPU."""
    config = config.model_copy(update={"sequence_length": length, "dropout": dropout})
    levels = [recompute] * len(config.by_level("d_model"))
    model = Hourglass(config, recompute=levels)
    if precision == "bf16":
        model.bfloat16()
    context = Context(config.parsed.factors, (1, 1) if drops else None)
    with FlopCounterMode(display=False, custom_mapping=NOT_IN_TORCHS_COUNTER) as counter:
        logits = model(torch.zeros(1, length, dtype=torch.long), context=context)
        logits.sum().backward()
    kernels = Kernels("cpu", precision, drops)  # type: ignore[arg-type]
    expected = executed_flops_per_token(config, levels, kernels)
    assert counter.get_total_flops() == round(expected * length)


@given(
    n=st.integers(1, 40),
    k=st.integers(1, 5),
    window=st.none() | st.integers(1, 50),
)
def test_visible_pairs_equal_the_masks(n: int, k: int, window: int | None) -> None:
    def count(mask: torch.Tensor) -> int:
        return int(mask.sum())

    groups = FixedGroups(k, n)
    band = torch.ones(n, n).tril() - torch.ones(n, n).tril(-window if window else -n)
    assert Pairing(n, n, window=window).visible() == count(band)
    pooling = Pairing(groups.count, groups.count * k, query_step=k, crosses=True)
    assert pooling.visible() == count(groups.shortening.visible(torch.device("cpu")))
    upsampling = Pairing(n, groups.count, key_step=k, crosses=True)
    assert upsampling.visible() == count(groups.upsampling.visible(torch.device("cpu")))


@pytest.mark.parametrize("positions", ["rotary", "relative"])
def test_a_causal_kernel_needs_half_the_scores(positions: str) -> None:
    """Causal FLOPs leave out n (n - 1) / 2 of the n x n pairs, and nothing else."""
    n, d, blocks = 128, 512, 3
    config = ModelConfig(hierarchy="3@1", positions=positions, sequence_length=n)
    products = 3 if positions == "relative" else 2
    skipped = 3 * blocks * products * 2 * d * n * (n - 1) // 2
    difference = training_flops_per_token(config) - causal_flops_per_token(config)
    assert difference * n == skipped


def test_fused_kernels_skip_masked_tiles() -> None:
    """On CUDA: of 4 x 4 tiles of 128, the 10 on and below the diagonal; 5 products backward."""
    n, d = 512, 512
    config = ModelConfig(hierarchy="1@1", positions="rotary", sequence_length=n, dropout=0.0)
    (block,) = [c for c in layer_costs(config) if c.layer.kind == "block"]
    product = 2 * 10 * 128**2 * d
    linear = block.flops - 2 * 2 * n * n * d
    assert block.executed == linear + 2 * product
    assert block.backward == 2 * linear + 5 * product


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
