"""Bytes of weights, gradients and optimizer states, against values computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from hg_scale.config.load import parse_config
from hg_scale.model.costs import parameter_count
from hg_scale.parallel.memory import rank_parameters, state_bytes


def config(zero: int, precision: str, **parallel: int) -> Any:
    return parse_config(
        {
            "model": {
                "hierarchy": "2@1 4@3 2@1",
                "d_model": 64,
                "heads": 4,
                "d_ff": 256,
                "sequence_length": 96,
                "pooling": "linear",
                "upsampling": "linear",
            },
            "training": {"global_batch_size": 8, "precision": precision},
            "parallel": {"zero_stage": zero, **parallel},
        }
    )


@pytest.mark.parametrize(
    ("zero", "precision", "world", "per_parameter"),
    [
        (0, "fp32", 1, 4 + 4 + 8),
        (1, "fp32", 4, 4 + 4 + 12 / 4),
        (1, "bf16", 1, 2 + 6 + 12),
        (1, "bf16", 4, 2 + 6 + 12 / 4),
        (2, "bf16", 4, 2 + (4 + 12) / 4),
        (3, "bf16", 4, (2 + 4 + 12) / 4),
    ],
)
def test_bytes_per_parameter(zero: int, precision: str, world: int, per_parameter: float) -> None:
    c = config(zero, precision)
    assert state_bytes(c, world) == pytest.approx(
        per_parameter * parameter_count(c.model), rel=1e-6
    )


def test_parameters_are_divided_over_stages_and_tensor_ranks() -> None:
    unsharded = parameter_count(config(1, "bf16").model)
    assert rank_parameters(config(1, "bf16", tensor=2)) == pytest.approx(unsharded / 2, abs=1)
    assert unsharded / 2 < rank_parameters(config(1, "bf16", pipeline=2)) < 0.8 * unsharded
