"""The section `deepspeed`: names and types as in the installed DeepSpeed, and invalid keys."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from hg_scale.config import ConfigError
from hg_scale.config.deepspeed import deepspeed_config, generated_settings
from hg_scale.config.expert_keys import ExpertKeys
from hg_scale.config.load import parse_config


def fields(model: Any) -> dict[str, Any]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def own_fields(key: str) -> dict[str, Any]:
    return fields(ExpertKeys.model_fields[key].annotation)


def test_nested_keys_are_known_to_deepspeed() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert own_fields("flops_profiler").keys() <= vars(DeepSpeedFlopsProfilerConfig({})).keys()
    for key, model in (
        ("zero_optimization", DeepSpeedZeroConfig),
        ("bf16", DeepSpeedBF16Config),
        ("comms_logger", CommsLoggerConfig),
    ):
        deepspeed_fields = fields(model)
        assert own_fields(key).keys() <= deepspeed_fields.keys(), key
        for name, field in own_fields(key).items():
            for kind in (bool, int):
                assert (kind in plain(field)) == (kind in plain(deepspeed_fields[name])), name


def plain(field: Any) -> set[Any]:
    """Return the types of a field without its limits; an enumeration of integers is int."""
    kinds = [field.annotation, *get_args(field.annotation)]
    kinds += [inner for kind in kinds for inner in get_args(kind)]
    return {
        int if isinstance(kind, type) and issubclass(kind, int) and kind is not bool else kind
        for kind in kinds
    }


@pytest.mark.parametrize(
    ("precision", "stage", "dtype"), [("bf16", 1, "fp32"), ("bf16", 2, "fp32"), ("fp32", 0, None)]
)
def test_bf16_accumulates_gradients_in_fp32(precision: str, stage: int, dtype: str | None) -> None:
    config = parse_config(
        {"training": {"precision": precision}, "parallel": {"zero_stage": stage}}
    )  # fmt: skip
    assert generated_settings(config, 4).get("data_types", {}).get("grad_accum_dtype") == dtype


# (dotted key below `deepspeed`, its value, what the message says)
INVALID: list[tuple[str, Any, str]] = [
    ("bf16", 3, "expected an object"),
    ("zero_optimization", True, "expected an object"),
    ("data_types", ["fp32"], "expected an object"),
    ("bf16.enabled", 1, "expected a valid boolean"),
    ("bf16.immediate_grad_update", "x", "expected a valid boolean"),
    ("checkpoint.load_universal", "x", "expected a valid boolean"),
    ("comms_logger.enabled", "maybe", "expected a valid boolean"),
    ("comms_logger.prof_ops", 5, "expected a valid list"),
    ("comms_logger.prof_ops", [5], "expected a valid string"),
    ("communication_data_type", "garbage", "expected 'fp32', 'bf16' or 'fp16'"),
    ("communication_data_type", 5, "expected 'fp32', 'bf16' or 'fp16'"),
    ("data_types.grad_accum_dtype", "garbage", "expected 'fp32'"),
    ("data_types.grad_accum_dtype", "bf16", "expected 'fp32'"),
    ("disable_allgather", True, "unknown key"),
    ("dump_state", "x", "expected a valid boolean"),
    ("flops_profiler.profile_step", "x", "expected a valid integer"),
    ("gradient_clipping", True, "expected a valid number"),
    ("gradient_predivide_factor", 0, "expected greater than or equal to"),
    ("gradient_predivide_factor", "x", "expected a valid number"),
    ("train_micro_batch_size_per_gpu", True, "expected a valid integer"),
    ("wall_clock_breakdown", "yes", "expected a valid boolean"),
    ("zero_optimization.round_robin_gradients", True, "unknown key"),
    ("zero_optimization.zero_hpz_partition_size", 2, "unknown key"),
    ("zero_optimization.zero_quantized_weights", True, "unknown key"),
    ("zero_optimization.stage", True, "expected a valid integer"),
    ("zero_optimization.stage", 1.0, "expected a valid integer"),
    ("zero_optimization.overlap_comm", "x", "expected a valid boolean"),
    ("zero_optimization.reduce_bucket_size", "big", "expected a valid integer"),
    ("zero_optimization.reduce_bucket_size", 0, "expected greater than or equal to 1"),
    ("zero_optimization.reduce_bucket_size", -1, "expected greater than or equal to 1"),
    ("zero_optimization.allgather_bucket_size", 3, "expected a multiple of 2"),
    ("zero_optimization.allgather_bucket_size", 0, "expected greater than or equal to 2"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "expected"), INVALID)
def test_error_is_one_line(key: str, value: Any, expected: str) -> None:
    tree: Any = value
    for name in reversed(key.split(".")):
        tree = {name: tree}
    with pytest.raises(ConfigError) as caught:
        parse_config({"deepspeed": tree})
    (line,) = map(str, caught.value.problems)
    assert line.startswith(f"deepspeed.{key} = {json.dumps(value)}: ") and expected in line


def test_contradiction_of_an_invalid_key_is_not_reported() -> None:
    """It would contradict the default only."""
    tree: dict[str, Any] = {
        "deepspeed": {
            "bf16": {"enabled": False},
            "zero_optimization": {"stage": 2},
            "gradient_clipping": 3.0,
            "train_micro_batch_size_per_gpu": 2,
        }
    }
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    assert {problem.key.removeprefix("deepspeed.") for problem in caught.value.problems} == {
        "bf16.enabled",
        "zero_optimization.stage",
        "gradient_clipping",
        "train_micro_batch_size_per_gpu",
    }
    tree |= {
        "training": {"precision": "fp16", "micro_batch_size": 0},
        "parallel": {"zero_stage": 9},
        "optimizer": {"gradient_clipping": -1},
    }
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    assert {problem.key for problem in caught.value.problems} == {
        "training.precision",
        "training.micro_batch_size",
        "parallel.zero_stage",
        "optimizer.gradient_clipping",
    }


def test_no_clipping_may_be_set_twice() -> None:
    """Without ZeRO the generated value is a norm that never clips, which is kept."""
    config = parse_config(
        {
            "training": {"precision": "fp32"},
            "parallel": {"zero_stage": 0},
            "optimizer": {"gradient_clipping": 0},
            "deepspeed": {"gradient_clipping": 0.0, "zero_optimization": {"overlap_comm": None}},
        }
    )
    assert deepspeed_config(config, 1) == generated_settings(config, 1)


@pytest.mark.parametrize("change", [{"prescale_gradients": True}, {"gradient_predivide_factor": 2}])
def test_scattered_gradients_cannot_be_prescaled(change: dict[str, Any]) -> None:
    tree = {"parallel": {"zero_stage": 2}, "deepspeed": change}
    with pytest.raises(ConfigError, match="reduce_scatter = false"):
        parse_config(tree)
    parse_config({"deepspeed": change})
    plain = {"prescale_gradients": False, "gradient_predivide_factor": 1.0}
    parse_config({**tree, "deepspeed": plain})
    parse_config({**tree, "deepspeed": {**change, "zero_optimization": {"reduce_scatter": False}}})


def test_sizes_may_be_floats() -> None:
    sizes = {"reduce_bucket_size": 5e8, "sub_group_size": 1e14, "allgather_bucket_size": 2e8}
    kept = parse_config({"deepspeed": {"zero_optimization": sizes}}).deepspeed.zero_optimization
    assert (kept.reduce_bucket_size, kept.sub_group_size) == (500_000_000, 10**14)
    assert isinstance(kept.allgather_bucket_size, int)
    with pytest.raises(ConfigError, match="reduce_bucket_size = 1.5: expected a valid integer"):
        parse_config({"deepspeed": {"zero_optimization": {"reduce_bucket_size": 1.5}}})


def test_only_set_keys_are_serialised() -> None:
    assert parse_config({}).model_dump()["deepspeed"] == {}
    tree = {"dump_state": False, "zero_optimization": {"overlap_comm": True, "stage": 1}}
    config = parse_config({"deepspeed": tree})
    assert config.model_dump()["deepspeed"] == tree
    assert json.loads(config.model_dump_json())["deepspeed"] == tree
    assert parse_config(config.model_dump()) == config
    assert isinstance(config.deepspeed, BaseModel)
