"""The section `deepspeed`: keys of DeepSpeed 0.19 that may be set beside the generated ones.

Others it ignores, at the top, or refuses, deeper down, once the processes are up; and it has some
that nothing here is made for: offloading, or weights laid out in a way that checkpoints do not know
(`round_robin_gradients`, hpZ and quantized ZeRO). All these are refused before. null leaves a key
to DeepSpeed's own default.
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


def _whole(value: Any) -> Any:
    """5e8 as 500000000: so DeepSpeed's own pages write sizes."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Bucket = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=1_000_000_000_000_000)]
Threshold = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=1_000_000_000_000_000)]

# Ours to set: what replaces each of them.
_OURS = {
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
    """Base of these sections: keys that are not set are not written down either."""

    @model_serializer(mode="wrap")
    def _those_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value not in (None, {})}


class BF16Keys(ExpertSection):
    """Mixed precision."""

    enabled: bool | None = Field(None, description="As `training.precision` says.")
    immediate_grad_update: bool | None = Field(
        None, description="ZeRO 1: add gradients up as they come, not after the backward pass."
    )


class CheckpointKeys(ExpertSection):
    """DeepSpeed's own checkpoints."""

    load_universal: bool | None = Field(
        None, description="DeepSpeed's own loading takes universal checkpoints."
    )


class CommsLoggerKeys(ExpertSection):
    """The log of collective operations."""

    enabled: bool | None = Field(None, description="Log collective operations.")
    prof_all: bool | None = Field(None, description="All of them.")
    prof_ops: list[str] | None = Field(None, description="Those of these names.")
    verbose: bool | None = Field(None, description="A line for each.")
    debug: bool | None = Field(None, description="With the name of the function that called.")


class DataTypeKeys(ExpertSection):
    """Types of numbers."""

    grad_accum_dtype: Literal["fp32"] | None = Field(
        None, description="Micro-batches are added up in it, whatever `training.precision` is."
    )


class FlopsProfilerKeys(ExpertSection):
    """The profile of one step."""

    enabled: bool | None = Field(None, description="Profile a step.")
    profile_step: NonNegative | None = Field(None, description="Which one.")
    module_depth: Annotated[int, Field(ge=-1, le=1000)] | None = Field(
        None, description="Depth of the modules that are summed up; -1: the innermost."
    )
    top_modules: Positive | None = Field(None, description="How many modules are named.")
    detailed: bool | None = Field(None, description="A line for each module.")
    output_file: str | None = Field(None, description="Where it goes instead of the screen.")
    recompute_fwd_factor: Annotated[float, Field(ge=0, le=10)] | None = Field(
        None, description="Forward passes that recomputation adds."
    )


class ZeroKeys(ExpertSection):
    """ZeRO: buckets, overlap, and when stage 3 holds weights whole. Sizes are in numbers."""

    stage: Annotated[int, Field(ge=0, le=3)] | None = Field(
        None, description="As `parallel.zero_stage` says."
    )
    overlap_comm: bool | None = Field(
        None, description="Reduce gradients during the backward pass."
    )
    contiguous_gradients: bool | None = Field(None, description="Copy them to one buffer.")
    reduce_scatter: bool | None = Field(None, description="Each rank gets its share only.")
    reduce_bucket_size: Bucket | None = Field(None, description="Reduced at a time.")
    allgather_partitions: bool | None = Field(None, description="Gather weights, or broadcast.")
    # Stages 1 and 2 assert that buckets begin at 4 bytes.
    allgather_bucket_size: (
        Annotated[
            int, BeforeValidator(_whole), Field(ge=2, le=1_000_000_000_000_000, multiple_of=2)
        ]
        | None
    ) = Field(None, description="Gathered at a time.")
    sub_group_size: Bucket | None = Field(None, description="Stage 3: updated at a time.")
    stage3_max_live_parameters: Threshold | None = Field(None, description="Held whole at most.")
    stage3_max_reuse_distance: Threshold | None = Field(
        None, description="Held on to where used again within so many."
    )
    stage3_model_persistence_threshold: Threshold | None = Field(
        None, description="Never shared out at most."
    )
    stage3_module_granularity_threshold: Threshold | None = Field(
        None, description="Modules of fewer to a module inside are gathered as one."
    )
    stage3_param_persistence_threshold: Threshold | None = Field(
        None, description="Weights of fewer are not shared out."
    )
    stage3_prefetch_bucket_size: Threshold | None = Field(None, description="Gathered ahead.")
    stage3_use_all_reduce_for_fetch_params: bool | None = Field(
        None, description="Gather by all-reduce."
    )
    log_trace_cache_warnings: bool | None = Field(
        None, description="Stage 3: say when the order of the modules has changed."
    )


class ExpertKeys(ExpertSection):
    """Handed to DeepSpeed beside what follows from the rest; null leaves a key to its default."""

    bf16: BF16Keys = Field(
        default_factory=BF16Keys,  # type: ignore[arg-type]
        description="Mixed precision.",
    )
    checkpoint: CheckpointKeys = Field(
        default_factory=CheckpointKeys,  # type: ignore[arg-type]
        description="Its own checkpoints.",
    )
    comms_logger: CommsLoggerKeys = Field(
        default_factory=CommsLoggerKeys,  # type: ignore[arg-type]
        description="The log of collective operations.",
    )
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="Gradients are reduced in it."
    )
    data_types: DataTypeKeys = Field(
        default_factory=DataTypeKeys,  # type: ignore[arg-type]
        description="Types of numbers.",
    )
    dump_state: bool | None = Field(None, description="Print its configuration at the start.")
    flops_profiler: FlopsProfilerKeys = Field(
        default_factory=FlopsProfilerKeys,  # type: ignore[arg-type]
        description="The profile of one step.",
    )
    gradient_clipping: Annotated[float, Field(ge=0, le=1e30)] | None = Field(
        None, description="As `optimizer.gradient_clipping` says."
    )
    gradient_predivide_factor: Annotated[float, Field(ge=1e-6, le=1_000_000)] | None = Field(
        None, description="`prescale_gradients`: divided by before the sum, the rest after it."
    )
    memory_breakdown: bool | None = Field(None, description="Log memory around every pass.")
    prescale_gradients: bool | None = Field(
        None, description="Divide gradients before they are summed up. ZeRO 0 and 1."
    )
    train_micro_batch_size_per_gpu: Positive | None = Field(
        None, description="As `training.micro_batch_size` says."
    )
    wall_clock_breakdown: bool | None = Field(None, description="Log the time of every pass.")
    zero_optimization: ZeroKeys = Field(
        default_factory=ZeroKeys,  # type: ignore[arg-type]
        description="ZeRO.",
    )

    @model_validator(mode="before")
    @classmethod
    def _ours_are_set_elsewhere(cls, tree: Any) -> Any:
        ours = [key for key in tree if key in _OURS] if isinstance(tree, dict) else []
        if not ours:
            return tree
        faults = [
            InitErrorDetails(
                type=PydanticCustomError("value_error", f"is set by {_OURS[key]}; remove it here"),
                loc=(key,),
                input=tree[key],
            )
            for key in ours
        ]
        raise ValidationError.from_exception_data(cls.__name__, faults)
