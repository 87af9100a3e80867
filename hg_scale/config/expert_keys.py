"""The section `deepspeed`: keys of DeepSpeed 0.19 that may be set besides the generated ones.

All other keys are rejected here. DeepSpeed itself would ignore unknown ones at the top level and
reject nested ones in a running job; and it has keys that this package does not support: offloading,
or layouts of the weights that checkpoints cannot describe (`round_robin_gradients`, hpZ, quantized
ZeRO). null leaves a key at DeepSpeed's default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from hg_scale.config.section import NonNegative, Positive, Section


def _as_integer(value: Any) -> Any:
    """Convert 5e8 to 500000000: DeepSpeed's documentation writes sizes as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Bucket = Annotated[int, BeforeValidator(_as_integer), Field(ge=1, le=1_000_000_000_000_000)]
Threshold = Annotated[int, BeforeValidator(_as_integer), Field(ge=0, le=1_000_000_000_000_000)]

# Keys of DeepSpeed that are derived, and what sets them here.
_DERIVED = {
    "optimizer": "the section optimizer",
    "scheduler": "the section schedule",
    "fp16": "training.precision",
    "amp": "training.precision",
    "bfloat16": "training.precision",
    "torch_autocast": "training.precision",
    "tensor_parallel": "parallel.tensor",
    "activation_checkpointing": "training.activation_checkpointing",
    "wandb": "logging.wandb_project",
    "elasticity": "training.global_batch_size",
    "sparse_attention": "model.window",
    "train_batch_size": "training.global_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "steps_per_print": "logging.every",
    "zero_allow_untested_optimizer": "optimizer.name",
}


class ExpertSection(Section):
    """Base of the sections below `deepspeed`: keys that are not set are not serialised."""

    @model_serializer(mode="wrap")
    def _serialize_set_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value not in (None, {})}


class BF16Keys(ExpertSection):
    """Mixed precision."""

    enabled: bool | None = Field(None, description="Must agree with `training.precision`.")
    immediate_grad_update: bool | None = Field(
        None, description="ZeRO 1: accumulate gradients during the backward pass, not after it."
    )


class CheckpointKeys(ExpertSection):
    """DeepSpeed's own checkpoints."""

    load_universal: bool | None = Field(
        None, description="DeepSpeed's own loading expects universal checkpoints."
    )


class CommsLoggerKeys(ExpertSection):
    """Logging of collectives."""

    enabled: bool | None = Field(None, description="Log collectives.")
    prof_all: bool | None = Field(None, description="Log all collectives.")
    prof_ops: list[str] | None = Field(None, description="Log the collectives with these names.")
    verbose: bool | None = Field(None, description="Log a line for each call.")
    debug: bool | None = Field(None, description="Log the name of the calling function.")


class DataTypeKeys(ExpertSection):
    """Data types."""

    grad_accum_dtype: Literal["fp32"] | None = Field(
        None, description="Data type in which gradients of micro-batches are accumulated."
    )


class FlopsProfilerKeys(ExpertSection):
    """Profiling of one step."""

    enabled: bool | None = Field(None, description="Profile a step.")
    profile_step: NonNegative | None = Field(None, description="Step to profile.")
    module_depth: Annotated[int, Field(ge=-1, le=1000)] | None = Field(
        None, description="Depth to which modules are aggregated; -1: the innermost."
    )
    top_modules: Positive | None = Field(None, description="Number of modules to list.")
    detailed: bool | None = Field(None, description="Print a line for each module.")
    output_file: str | None = Field(None, description="File to write instead of standard output.")
    recompute_fwd_factor: Annotated[float, Field(ge=0, le=10)] | None = Field(
        None, description="Additional forward passes by recomputation."
    )


class ZeroKeys(ExpertSection):
    """ZeRO: buckets, overlap, and gathering under stage 3. Sizes are numbers of elements."""

    stage: Annotated[int, Field(ge=0, le=3)] | None = Field(
        None, description="Must agree with `parallel.zero_stage`."
    )
    overlap_comm: bool | None = Field(
        None, description="Reduce gradients during the backward pass."
    )
    contiguous_gradients: bool | None = Field(None, description="Copy gradients to one buffer.")
    reduce_scatter: bool | None = Field(
        None, description="Reduce-scatter gradients instead of all-reducing them."
    )
    reduce_bucket_size: Bucket | None = Field(None, description="Elements per reduction.")
    allgather_partitions: bool | None = Field(
        None, description="All-gather weights instead of broadcasting them."
    )
    # Stages 1 and 2 assert that buckets are aligned to 4 bytes.
    allgather_bucket_size: (
        Annotated[
            int, BeforeValidator(_as_integer), Field(ge=2, le=1_000_000_000_000_000, multiple_of=2)
        ]
        | None
    ) = Field(None, description="Elements per all-gather.")
    sub_group_size: Bucket | None = Field(
        None, description="Stage 3: elements per optimizer update."
    )
    stage3_max_live_parameters: Threshold | None = Field(
        None, description="Maximum elements that are gathered at a time."
    )
    stage3_max_reuse_distance: Threshold | None = Field(
        None, description="Keep a gathered parameter if it is used again within this many elements."
    )
    stage3_model_persistence_threshold: Threshold | None = Field(
        None, description="Maximum elements that are never sharded."
    )
    stage3_module_granularity_threshold: Threshold | None = Field(
        None, description="Modules with fewer elements per submodule are gathered at once."
    )
    stage3_param_persistence_threshold: Threshold | None = Field(
        None, description="Parameters with fewer elements are not sharded."
    )
    stage3_prefetch_bucket_size: Threshold | None = Field(None, description="Elements to prefetch.")
    stage3_use_all_reduce_for_fetch_params: bool | None = Field(
        None, description="Gather parameters by all-reduce."
    )
    log_trace_cache_warnings: bool | None = Field(
        None, description="Stage 3: warn when the order of the modules changes."
    )


class ExpertKeys(ExpertSection):
    """Expert keys that are passed to DeepSpeed; null leaves a key at DeepSpeed's default."""

    bf16: BF16Keys = Field(
        default_factory=BF16Keys,
        description="Mixed precision.",
    )
    checkpoint: CheckpointKeys = Field(
        default_factory=CheckpointKeys,
        description="DeepSpeed's own checkpoints.",
    )
    comms_logger: CommsLoggerKeys = Field(
        default_factory=CommsLoggerKeys,
        description="Logging of collectives.",
    )
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="Data type in which gradients are reduced."
    )
    data_types: DataTypeKeys = Field(
        default_factory=DataTypeKeys,
        description="Data types.",
    )
    dump_state: bool | None = Field(
        None, description="Print DeepSpeed's configuration at the start."
    )
    flops_profiler: FlopsProfilerKeys = Field(
        default_factory=FlopsProfilerKeys,
        description="Profiling of one step.",
    )
    gradient_clipping: Annotated[float, Field(ge=0, le=1e30)] | None = Field(
        None, description="Must agree with `optimizer.gradient_clipping`."
    )
    gradient_predivide_factor: Annotated[float, Field(ge=1e-6, le=1_000_000)] | None = Field(
        None,
        description="With `prescale_gradients`: divisor before the sum; the rest follows after it.",
    )
    memory_breakdown: bool | None = Field(
        None, description="Log memory around every forward and backward pass."
    )
    prescale_gradients: bool | None = Field(
        None, description="Divide gradients before they are summed. ZeRO 0 and 1."
    )
    train_micro_batch_size_per_gpu: Positive | None = Field(
        None, description="Must agree with `training.micro_batch_size`."
    )
    wall_clock_breakdown: bool | None = Field(
        None, description="Log the time of every forward and backward pass."
    )
    zero_optimization: ZeroKeys = Field(
        default_factory=ZeroKeys,
        description="ZeRO.",
    )

    @model_validator(mode="before")
    @classmethod
    def _reject_derived_keys(cls, tree: Any) -> Any:
        derived = [key for key in tree if key in _DERIVED] if isinstance(tree, dict) else []
        if not derived:
            return tree
        errors = [
            InitErrorDetails(
                type=PydanticCustomError(
                    "value_error", f"is set by {_DERIVED[key]}; remove it here"
                ),
                loc=(key,),
                input=tree[key],
            )
            for key in derived
        ]
        raise ValidationError.from_exception_data(cls.__name__, errors)
