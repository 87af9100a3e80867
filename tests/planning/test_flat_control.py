"""Flat controls: equal FLOPs, legal shapes, depth and width by the rule, files that load."""

from __future__ import annotations

import json
from math import exp
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hg_scale.config.errors import ConfigError
from hg_scale.config.load import load_config, parse_config
from hg_scale.config.schema import Config, ModelConfig
from hg_scale.errors import UserError
from hg_scale.model.costs import training_flops_per_token
from hg_scale.planning.flat_control import control_file, flat_control, rule_depth
from tests.shared import ROOT

PRESETS = ["quickstart", "hg_1b", "hg_1b_bytes", "hg_7b", "hg_7b_bytes", "hg_30b"]


def training_flops_of_flat(model: ModelConfig) -> float:
    """FLOPs per token written out, for windows with rotary or full attention with relative ones."""
    d, d_ff, n = model.d_model, model.d_ff, model.sequence_length
    assert isinstance(d, int) and isinstance(d_ff, int) and not isinstance(model.window, list)
    keys, relative = min(model.window or n, n), model.positions == "relative"
    matrices = d * d * (5 if relative else 4) + d * d_ff * (
        3 if model.activation == "swiglu" else 2
    )
    scores = keys * d * (3 if relative else 2)
    return 6 * (model.parsed.blocks * (matrices + scores) + d * model.padded_vocab)


@st.composite
def hierarchies(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of one to three shortenings, widths by level, windows, layouts."""
    k = draw(st.lists(st.integers(2, 4), min_size=1, max_size=3))
    blocks = draw(st.lists(st.integers(0, 5), min_size=len(k), max_size=len(k)))
    total, entries = 1, []
    for step, count in zip(k, blocks, strict=True):
        total *= step
        entries.append(f"{count}@{total}")
    outer = [f"{draw(st.integers(0, 4))}@1", f"{draw(st.integers(1, 4))}@1"]
    levels, tensor = len(k) + 1, draw(st.sampled_from([1, 2, 3, 4]))
    head = draw(st.sampled_from([8, 16, 64]))
    heads = [
        tensor * n for n in draw(st.lists(st.integers(1, 4), min_size=levels, max_size=levels))
    ]
    ratio = draw(st.sampled_from([2, 3, 4]))
    full = draw(st.booleans())
    return {
        "model": {
            "hierarchy": " ".join([outer[0], *entries, *entries[-2::-1], outer[1]]),
            "d_model": [head * count for count in heads],
            "heads": heads,
            "d_ff": [ratio * head * count for count in heads],
            "positions": draw(st.sampled_from(["rotary", "relative"])) if full else "rotary",
            "window": None if full else [draw(st.integers(8, 200))] + [None] * (levels - 1),
            "activation": draw(st.sampled_from(["gelu", "swiglu"])),
            "pooling": draw(st.sampled_from(["attention", "average", "linear"])),
            "vocab_multiple": 192,
            "sequence_length": total * draw(st.integers(1, 40)),
        },
        "optimizer": {"learning_rate_by_level": [2.0, *[1.0] * (levels - 1)]},
        "training": {"activation_checkpointing": [False] * (levels - 1) + [True]},
        "parallel": {"tensor": tensor, "pipeline": draw(st.sampled_from([1, 2]))},
    }


@settings(max_examples=200, deadline=None)
@given(hierarchies())
def test_equal_flops_and_legal_shapes_for_random_hierarchies(tree: dict[str, Any]) -> None:
    try:
        config = parse_config(tree)
    except ConfigError:
        assume(False)
    try:
        control = flat_control(config)
    except UserError as error:
        # One flat layer of the narrowest legal width, with hardly any feed-forward, costs more.
        head, tensor = tree["model"]["d_model"][0] // tree["model"]["heads"][0], tree["parallel"]
        width = head * tensor["tensor"]
        least = {"d_model": width, "heads": tensor["tensor"], "d_ff": tensor["tensor"]}
        flat = {**tree["model"], **least, "hierarchy": f"{tensor['pipeline']}@1", "window": None}
        assert training_flops_of_flat(ModelConfig(**flat)) > 0.8 * training_flops_per_token(
            config.model
        )
        assert "\n" not in str(error) and "within 1%" in str(error)
        return
    flat_config = control.apply(config)
    flat = flat_config.model
    assert not flat.parsed.shortenings
    reached = training_flops_of_flat(flat) / training_flops_per_token(config.model)
    assert abs(reached - 1) <= 0.01
    assert control.difference == pytest.approx(reached - 1, abs=1e-9)
    assert (flat.parsed.blocks, flat.d_model) == (control.depth, control.width)
    tensor = config.parallel.tensor
    assert flat.heads % tensor == flat.d_ff % tensor == 0
    assert flat.d_model // flat.heads == config.model.d_model[0] // config.model.heads[0]
    assert flat.window == config.model.by_level("window")[0]
    assert control.depth >= config.parallel.pipeline
    assert flat_config.optimizer.learning_rate_by_level == 2
    assert flat_config.training.activation_checkpointing is True


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_near_the_rule_with_their_ratio_of_d_ff(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.json")
    control = flat_control(config)
    assert control.depth == pytest.approx(rule_depth(control.width), rel=0.25)
    kept = config.model.by_level("d_ff")[0] / config.model.by_level("d_model")[0]
    assert control.settings["model.d_ff"] / control.width == pytest.approx(kept, rel=0.1)
    assert control.settings["model.d_ff"] % 32 == 0


def test_control_chosen_by_hand_is_found() -> None:
    """configs/flat_1b_bytes.json was made before this rule was written down."""
    control = flat_control(load_config(ROOT / "configs" / "hg_1b_bytes.json"))
    by_hand = load_config(ROOT / "configs" / "flat_1b_bytes.json").model
    for key, value in control.settings.items():
        assert getattr(by_hand, key.removeprefix("model.")) == value, key


def test_rule_gives_the_published_width_of_a_trillion_parameters() -> None:
    """Abstract of arXiv 2006.12467: a width of 30K is optimal; 12 x layers x width^2 parameters."""
    width = next(w for w in range(1000, 100_000, 64) if 12 * rule_depth(w) * w**2 >= 1e12)
    assert width == pytest.approx(30_000, rel=0.03)
    assert rule_depth(round(exp(5.039 + 0.0555 * 24))) == pytest.approx(24, abs=0.02)


def test_rule_continues_below_the_measured_depths() -> None:
    depths = [rule_depth(width) for width in range(8, 1000, 8)]
    assert all(0 < a < b < a + 0.7 for a, b in zip(depths, depths[1:], strict=False))
    assert rule_depth(64) == pytest.approx(64 / 35.88, rel=1e-3)


def test_deeper_models_are_wider_too() -> None:
    """Nearly 9 times the FLOPs go into both."""
    small, large = (
        flat_control(
            parse_config({"model": {"hierarchy": f"2@1 {blocks}@3 2@1", "positions": "rotary"}})
        )
        for blocks in (4, 200)
    )
    assert large.hierarchical_flops_per_token > 8 * small.hierarchical_flops_per_token
    assert large.depth > 1.3 * small.depth and large.width > 1.5 * small.width


def test_shorten_factor_dropout_and_shared_biases_are_dropped_where_they_cannot_be() -> None:
    model = {
        "hierarchy": "1@1 4@2 1@1", "pooling": "average", "upsampling": "repeat",
        "shorten_factor_choices": [2, 3], "shared_position_bias": True, "sequence_length": 96,
        "positions": ["rotary", "relative"],
    }  # fmt: skip
    config = parse_config({"model": model})
    flat = flat_control(config).apply(config).model
    assert flat.shorten_factor_choices is None and flat.shared_position_bias is False
    assert flat.positions == "rotary"
    mean = training_flops_per_token(config.model)
    assert training_flops_of_flat(flat) == pytest.approx(mean, rel=0.01)


def test_file_extends_the_given_one_and_loads(tmp_path: Path) -> None:
    base = ROOT / "configs" / "hg_7b.json"
    config = load_config(base)
    control = flat_control(config)
    target = tmp_path / "flat" / "control.json"
    target.parent.mkdir()
    target.write_text(control_file(control, base, target))
    loaded = load_config(target)
    assert loaded.model == control.apply(config).model
    assert loaded.data == config.data and loaded.optimizer == config.optimizer
    written = json.loads(target.read_text())
    assert not Path(written["extends"]).is_absolute()
    assert f"({control.difference:+.2%})" in loaded.notes
    assert "Window of 1024 tokens in every layer" in loaded.notes
    assert "arXiv 2006.12467" in loaded.notes


def test_flat_configuration_is_refused() -> None:
    with pytest.raises(UserError, match="^model.hierarchy = '6@1': is flat already; name a"):
        flat_control(Config(model=ModelConfig(hierarchy="6@1")))


def test_hierarchy_below_one_flat_layer_is_refused() -> None:
    """Heads of width 512 on 4 tensor ranks make a layer of width 2048, more than the hierarchy."""
    tree = {
        "model": {
            "hierarchy": "0@1 1@8 0@1", "pooling": "average", "upsampling": "repeat",
            "d_model": 2048, "heads": 4, "d_ff": 256, "sequence_length": 64,
        },
        "parallel": {"tensor": 4},
    }  # fmt: skip
    with pytest.raises(UserError, match="heads of width 512 and parallel.tensor 4"):
        flat_control(parse_config(tree))
