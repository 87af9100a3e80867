"""Every preset loads, and has the parameters and costs that its name states."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from hg_scale.config import load_config
from hg_scale.model.costs import parameter_count, training_flops_per_token
from hg_scale.model.hourglass import Hourglass

CONFIGS = Path(__file__).parent.parent / "configs"
PRESETS = sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.json"))

# Exact counts of the authors' code with a vocabulary of 256.
PAPER = {
    "6x1": 20_754_688,
    "8x1": 27_584_768,
    "10x1": 34_414_848,
    "12x1": 41_244_928,
    "14x1": 48_075_008,
    "2x1_1x3_2x1": 24_174_848,
    "2x1_4x3_2x1": 34_419_968,
    "2x1_4x4_2x1": 34_419_968,
    "2x1_8x3_2x1": 48_080_128,
    "2x1_8x4_2x1": 48_080_128,
    "2x1_1x2_4x4_1x2_2x1": 48_085_248,
    "5x1_8x2_5x1": 68_570_368,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_equals_the_modules(name: str) -> None:
    config = load_config(CONFIGS / name, world_size=64 if "30b" in name else None)
    with torch.device("meta"):
        model = Hourglass(config.model, seed=None)
    assert sum(p.numel() for p in model.parameters()) == parameter_count(config.model)
    assert re.search(r"arXiv \d{4}\.\d{5}\b", config.notes)  # cites the source of its numbers


@pytest.mark.parametrize(("row", "count"), PAPER.items())
def test_parameter_counts_equal_the_papers(row: str, count: int) -> None:
    config = load_config(CONFIGS / "paper" / f"table1_{row}.json")
    assert parameter_count(config.model) == count


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("hg_1b", 0.9, 1.1), ("hg_1b_bytes", 0.9, 1.1), ("hg_7b", 6.5, 7.5),
     ("hg_7b_bytes", 6.5, 7.5), ("hg_30b", 29, 32)],
)  # fmt: skip
def test_parameter_count_is_near_the_name(name: str, low: float, high: float) -> None:
    config = load_config(CONFIGS / f"{name}.json")
    assert low <= parameter_count(config.model) / 1e9 <= high


@pytest.mark.parametrize("name", ["1b", "1b_bytes"])
def test_flat_controls_have_equal_flops(name: str) -> None:
    hourglass = load_config(CONFIGS / f"hg_{name}.json").model
    flat = load_config(CONFIGS / f"flat_{name}.json").model
    ratio = training_flops_per_token(flat) / training_flops_per_token(hourglass)
    assert ratio == pytest.approx(1, abs=0.02)
