"""The names of DeepSpeed's own keys, held against the version that is installed."""

from __future__ import annotations

from typing import Any

import pytest

from hg_scale.config.deepspeed import EXPERT_KEYS, generated
from hg_scale.config.load import parse_config


def names(model: Any) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def test_nested_keys_are_known_to_deepspeed() -> None:
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    found = {
        "zero_optimization": names(DeepSpeedZeroConfig),
        "bf16": names(DeepSpeedBF16Config),
        "flops_profiler": set(vars(DeepSpeedFlopsProfilerConfig({}))),
    }
    for key, known in found.items():
        assert EXPERT_KEYS[key] is not None and EXPERT_KEYS[key] <= known, key


@pytest.mark.parametrize(
    ("precision", "stage", "dtype"), [("bf16", 1, "fp32"), ("bf16", 2, "fp32"), ("fp32", 0, None)]
)
def test_bf16_adds_up_gradients_in_fp32(precision: str, stage: int, dtype: str | None) -> None:
    config = parse_config(
        {"training": {"precision": precision}, "parallel": {"zero_stage": stage}}
    )  # fmt: skip
    assert generated(config, 4).get("data_types", {}).get("grad_accum_dtype") == dtype
