"""The sections on training: optimizer, schedule, layout, loop, checkpoints, monitoring, logging."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hg_scale.config.constants import DEFAULT_SEED
from hg_scale.config.section import Fraction, NonNegative, Positive, Ratio, Seconds, Section

Precision = Literal["fp32", "bf16"]
RateFactor = Annotated[float, Field(ge=1e-6, le=1_000_000)]


class OptimizerConfig(Section):
    """The optimizer; AdamW decays matrices only."""

    name: Literal["adamw", "adam"] = Field(
        "adamw", description="`adamw`, or the `adam` of the paper (without weight decay)."
    )
    learning_rate: Annotated[float, Field(ge=1e-30, le=1000)] = Field(
        4e-4, description="Peak learning rate."
    )
    learning_rate_by_level: RateFactor | list[RateFactor] = Field(
        1.0, description="Factor on the learning rate, by level; embedding and head are level 0."
    )
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.95], description="Decay rates of the first and the second moment."
    )
    eps: Annotated[float, Field(ge=1e-30, le=1)] = Field(  # fp32 ends at 1e-38
        1e-8, description="Added to the square root of the second moment."
    )
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = Field(
        0.1, description="Decoupled weight decay of all matrices (not of norms and biases)."
    )
    gradient_clipping: Annotated[float, Field(ge=0, le=1e30)] = Field(
        1.0, description="Maximum global gradient norm; 0: no clipping."
    )


class ScheduleConfig(Section):
    """Learning rate by step: linear warm-up, then one of three shapes."""

    kind: Literal["cosine", "rsqrt", "wsd"] = Field(
        "cosine",
        description="After the warm-up: `cosine`, inverse square root (`rsqrt`), or constant with "
        "a final decay (`wsd`: warm-up, stable, decay).",
    )
    warmup_steps: NonNegative = Field(0, description="Steps of linear warm-up.")
    decay_steps: NonNegative = Field(
        0, description="`wsd`, `rsqrt`: steps of the decay at the end."
    )
    decay_shape: Literal["linear", "sqrt"] = Field(
        "linear", description="`wsd`: shape of the decay, linear or 1 - sqrt."
    )
    cycle_steps: Positive | None = Field(
        None,
        description="`cosine`: length of the half wave, counted after the warm-up. null: "
        "`training.steps`, as in the paper (the rate then ends a little above its minimum).",
    )
    minimum_ratio: Fraction = Field(
        0.0, description="Minimum rate after the warm-up, as a fraction of the peak."
    )


class ParallelConfig(Section):
    """How the model is sharded; the remaining factor of the processes is data parallelism."""

    tensor: Positive = Field(1, description="Tensor-parallel size (Megatron's layers).")
    pipeline: Positive = Field(1, description="Pipeline stages, balanced by FLOPs.")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(
        1, description="DeepSpeed ZeRO stage. Pipelines allow 0 and 1, bf16 allows 1 to 3."
    )
    timeout: Seconds = Field(
        600.0,
        description="Seconds that ranks wait for each other within a step before the run ends "
        "because a rank is lost; 1800 at the start and around checkpoints and validations.",
    )
    elastic: bool = Field(
        False,
        description="If the number of processes does not fit, continue in the nearest layout that "
        "keeps `training.global_batch_size`; under `slurm/*.sh` also on fewer processes.",
    )


class TrainingConfig(Section):
    """The training loop."""

    steps: Positive = Field(1000, description="Optimizer steps of the complete schedule.")
    global_batch_size: Positive = Field(8, description="Sequences per optimizer step.")
    micro_batch_size: Positive = Field(
        1, description="Sequences per forward pass of one data-parallel rank."
    )
    precision: Precision = Field(
        "bf16", description="`bf16` (fp32 master weights under ZeRO) or `fp32`."
    )
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = Field(
        DEFAULT_SEED,
        description="Determines initial weights, data order and dropout, equally in every layout.",
    )
    activation_checkpointing: bool | list[bool] = Field(
        False, description="Recompute blocks in the backward pass to save memory, by level."
    )
    validate_every: NonNegative = Field(
        0, description="Steps between validations; 0: after the last step only."
    )
    validation_windows: Positive | None = Field(
        None, description="Windows of the validation split to score; null: all."
    )
    stop_signals: list[Literal["TERM", "USR1", "USR2", "HUP", "XCPU"]] = Field(
        ["TERM", "USR1", "USR2", "HUP"],
        description="Signals on which a run finishes its step, saves and exits with code 75, as "
        "on a first Ctrl-C.",
    )
    stop_margin: Annotated[float, Field(ge=0, le=10_000_000)] = Field(
        60.0,
        description="If the end of the job is known (`slurm/*.sh`): seconds to spare when the run "
        "stops before it, on top of those for a step, a checkpoint and a due validation.",
    )


class GuardConfig(Section):
    """Bad steps, which are skipped: the optimizer does not update the weights."""

    spike_sigma: Annotated[float, Field(ge=0.001, le=1_000_000)] | None = Field(
        None,
        description="Skip a step whose loss exceeds the mean of the recent losses by more than "
        "this many standard deviations. null: never. Steps with a non-finite loss or gradient are "
        "always skipped.",
    )
    window: Annotated[int, Field(ge=4, le=1_000_000)] = Field(
        128,
        description="Recent steps that are considered: for `guard.spike_sigma`, once half as many "
        "losses are known, and for `guard.max_skipped`.",
    )
    max_skipped: NonNegative = Field(
        10,
        description="Skipped steps among the last `guard.window` that are tolerated; one more ends "
        "the run.",
    )


class CheckpointConfig(Section):
    """Saving and resuming."""

    every: NonNegative = Field(
        0, description="Steps between checkpoints; 0: after the last step only."
    )
    keep_last: NonNegative = Field(
        0, description="Number of the newest complete checkpoints to keep; 0: all."
    )
    keep_every: NonNegative = Field(
        0,
        description="With `keep_last`: also keep checkpoints whose step is a multiple of this; 0: "
        "none.",
    )
    async_: bool = Field(
        True,
        alias="async",
        description="Write checkpoints in the background: training waits only for the copy to host "
        "memory, which takes 12 bytes for each parameter in the rank's share of the optimizer. "
        "false: training waits for the disk.",
    )
    start_from: str | None = Field(
        None,
        description="A checkpoint folder, or a run folder (its newest complete checkpoint), to "
        "start from if the run folder has no checkpoint: weights, optimizer, step and data "
        "position are taken over. With `schedule.kind = wsd` and a new `training.steps` this "
        "branches a decay off any checkpoint.",
    )


class WatchdogConfig(Section):
    """A run that hangs is ended, so that it can be restarted; slow ranks are reported."""

    factor: Ratio = Field(
        10.0,
        description="A step that takes more than this many times the median of the recent steps "
        "hangs: the ranks write their stacks to `RUN/stacks`, report which ranks are missing, and "
        "exit with code 76. 0: never.",
    )
    at_least: Seconds = Field(
        300.0,
        description="Seconds below which no step counts as hanging, however short the others are. "
        "Must exceed the time to read data with all retries (`data.timeout`, `data.retries`).",
    )
    first: Seconds = Field(
        1800.0, description="Seconds that each of the first three steps after a start may take."
    )
    pause: Seconds = Field(
        3600.0,
        description="Seconds that the start, a validation, a checkpoint or the end may take.",
    )
    slow_rank: Ratio = Field(
        1.3,
        description="Report a rank whose own time exceeds the median of the ranks by this factor "
        "in five consecutive logged steps. 0: never.",
    )


class LoggingConfig(Section):
    """What is recorded besides `metrics.jsonl` in the run folder, which is always written."""

    every: Positive = Field(10, description="Steps between logged lines.")
    wandb_project: str | None = Field(
        None, description="Weights & Biases project; null: not used. Offline without an API key."
    )
    wandb_name: str | None = Field(
        None, description="Name of the run in Weights & Biases; null: the run folder's name."
    )
