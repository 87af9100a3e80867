"""The one schema of `configs/*.json`. Each section is one pydantic model and one part of the code.

Every field carries its meaning: `docs/config.md` and the JSON Schema for editors are generated
from here. What involves more than one key is checked in `checks.py` and the files it names.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from hg_scale.config.constants import DEFAULT_SEED
from hg_scale.config.expert_keys import ExpertKeys
from hg_scale.config.hierarchy import Hierarchy
from hg_scale.config.section import (
    Fraction,
    NonNegative,
    Positive,
    Ratio,
    Seconds,
    Section,
    Width,
)

SCHEMA_VERSION = 1

# A value for every level, or one value for all; lists run from the outermost level inwards.
WidthByLevel = Width | Annotated[list[Width], Field(min_length=1)]

Pooling = Literal["average", "linear", "attention+average", "attention+linear"]
Upsampling = Literal["repeat", "linear", "attention+repeat", "attention+linear", "attention+none"]
Positions = Literal["relative", "rotary"]
Precision = Literal["fp32", "bf16"]


# Keys of the model that its weights do not depend on: they may change from run to run.
FREE_MODEL_KEYS = frozenset(
    {"sequence_length", "dropout", "shorten_factor_choices", "initialization"}
)


class ModelConfig(Section):
    """What the Hourglass is. Lists by level run from the outermost level (full length) inwards."""

    hierarchy: str = Field(
        "2@1 8@3 2@1",
        description="Blocks and total shortening factors in the paper's notation: `2@1 8@3 2@1` is "
        "2 blocks at full length, 8 on a sequence three times shorter, 2 at full length. `6@1` is "
        "a flat Transformer.",
    )
    vocab_size: Annotated[int, Field(ge=1, le=100_000_000)] = Field(
        256, description="Token ids run from 0 to vocab_size - 1."
    )
    vocab_multiple: Width = Field(
        64,
        description="Embedding and head are padded to a multiple of this, so that every "
        "`parallel.tensor` gives the same model; padded logits are masked.",
    )
    sequence_length: Positive = Field(2046, description="Tokens in a training window.")
    d_model: WidthByLevel = Field(512, description="Width of the activations, by level.")
    heads: WidthByLevel = Field(8, description="Attention heads, by level.")
    d_ff: WidthByLevel = Field(2048, description="Width inside the feed-forward, by level.")
    window: Positive | list[Positive | None] | None = Field(
        None,
        description="Sliding attention window, by level, in positions of that level: a position "
        "sees itself and the window - 1 before it. null: full causal attention.",
    )
    pooling: Pooling = Field(
        "attention+average",
        description="How groups are shortened. `attention+X`: attention over the whole sequence, "
        "its queries based on X; `attention` is short for `attention+average`.",
    )
    upsampling: Upsampling = Field(
        "attention+repeat",
        description="How groups are expanded. `attention+X`: attention to the short sequence, its "
        "queries based on X added to the skip; `attention` is short for `attention+repeat`.",
    )
    skip: Literal["add", "learned"] = Field(
        "add",
        description="How a level's input joins its output: `add` as in the paper, `learned` with "
        "one trained gain per feature, starting at 1.",
    )
    positions: Positions | list[Positions] = Field(
        "relative",
        description="Transformer-XL `relative` scores as in the paper, or `rotary` embeddings; by "
        "level. Resampling attention uses the kind of its longer side.",
    )
    shared_position_bias: bool = Field(
        False,
        description="One pair of relative-position biases for the whole model, as in the paper, "
        "instead of one pair a layer.",
    )
    rotary_base: Annotated[float, Field(ge=1, le=1e12)] = Field(
        10_000.0, description="Base of the rotary frequencies."
    )
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="Kind of every norm.")
    # Of a smaller one the backward pass takes powers that fp32 cannot hold.
    norm_eps: Annotated[float, Field(ge=1e-20, le=1)] = Field(
        1e-6, description="Epsilon of every norm."
    )
    activation: Literal["gelu", "swiglu"] = Field(
        "gelu", description="Feed-forward: GELU in its tanh form, or gated SiLU (three matrices)."
    )
    qk_norm: bool = Field(
        False, description="RMS-normalise queries and keys of each head, with a trained scale."
    )
    bias: bool = Field(True, description="Biases in the linear layers.")
    dropout: Fraction = Field(
        0.0,
        description="Dropout after the embedding, on attention probabilities, after attention, in "
        "and after the feed-forward.",
    )
    shorten_factor_choices: (
        Annotated[list[Width], Field(min_length=1)]
        | Annotated[list[Annotated[list[Width], Field(min_length=1)]], Field(min_length=1)]
        | None
    ) = Field(
        None,
        description="Shorten-factor dropout (paper, section 4.1): each training step draws every "
        "level's step factor from these; a list for all levels or one list a level. Evaluation "
        "uses the factors of `hierarchy`.",
    )
    initialization: Literal["paper", "scaled_normal"] = Field(
        "paper",
        description="`paper`: Glorot-uniform matrices, biases of 1e-6, as the authors' code. "
        "`scaled_normal`: embeddings normal of 1, matrices normal of 1 / sqrt(fan-in), the last "
        "one of each residual branch divided by sqrt(2 x blocks).",
    )

    @field_validator("pooling", mode="before")
    @classmethod
    def _pooling_shorthand(cls, value: Any) -> Any:
        return "attention+average" if value == "attention" else value

    @field_validator("upsampling", mode="before")
    @classmethod
    def _upsampling_shorthand(cls, value: Any) -> Any:
        return "attention+repeat" if value == "attention" else value

    @field_validator("hierarchy")
    @classmethod
    def _hierarchy_parses(cls, value: str) -> str:
        Hierarchy.parse(value)
        return value

    @cached_property
    def parsed(self) -> Hierarchy:
        """The hierarchy, read."""
        return Hierarchy.parse(self.hierarchy)

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding and of the head."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def by_level(self, key: str) -> list[Any]:
        """The values of a by-level key, one a level, outermost first."""
        return by_level(getattr(self, key), self.parsed.level_count)

    @cached_property
    def factor_choices(self) -> list[list[int]] | None:
        """The sets that shorten-factor dropout draws from, one a level."""
        choices = self.shorten_factor_choices
        if choices is None:
            return None
        if isinstance(choices[0], list):
            return choices
        return [choices] * len(self.parsed.shortenings)


def by_level(value: Any, levels: int) -> list[Any]:
    """A by-level value as a list with one entry a level."""
    return list(value) if isinstance(value, list) else [value] * levels


class SourceConfig(Section):
    """One of several corpora."""

    path: str = Field(description="As `data.path`.")
    weight: Annotated[float, Field(ge=1e-6, le=1e15)] = Field(
        1.0, description="Share of the windows, in proportion to the other sources' weights."
    )
    when_exhausted: Literal["repeat", "retire"] = Field(
        "repeat",
        description="After its last window: begin again, or leave its share to the others.",
    )
    name: str | None = Field(
        None, description="What it is called in the logs; null: the last part of its path."
    )

    @property
    def label(self) -> str:
        """The source's name."""
        return self.name or self.path.partition("{}")[0].rstrip("/").rpartition("/")[2]


class DataConfig(Section):
    """Where the tokens come from, and how they are read."""

    path: str | None = Field(
        None,
        description="Folder with `index.json` and the shards, as written by `data_prep/*.py`; or "
        "an `http(s)://` URL, or `pipe:COMMAND {}`, where `{}` stands for the file. A relative "
        "path counts from the current folder.",
    )
    sources: Annotated[list[SourceConfig], Field(min_length=1)] | None = Field(
        None,
        description="Several corpora instead of `data.path`; windows are drawn in exact "
        "proportion to their weights.",
    )
    tokenizer: str | None = Field(
        None,
        description="What the data must have been made with: the tokenizer's name in the index, or "
        "the beginning of its checksum. null: whatever the index says.",
    )
    workers: Annotated[int, Field(ge=0, le=1000)] = Field(
        0, description="Processes that read ahead for each rank that reads; 0: a thread."
    )
    prefetch_mb: NonNegative = Field(
        64,
        description="Megabytes of tokens that each rank reads ahead, in their stored size (1, 2 or "
        "4 bytes each); 0: only what the next batches need.",
    )
    retries: NonNegative = Field(
        3, description="How often a read that fails is tried again, after longer and longer pauses."
    )
    timeout: Seconds = Field(
        60.0, description="Seconds without a byte after which a read from a URL or pipe has failed."
    )
    on_fault: Literal["stop", "skip"] = Field(
        "stop",
        description="What a shard that is missing, truncated or corrupt does: `stop` the run, or "
        "`skip` the windows it touches, which are masked out of the loss and written down.",
    )
    max_skipped: NonNegative = Field(
        1000, description="`skip`: windows that a run may skip before it stops all the same."
    )

    @property
    def corpora(self) -> list[SourceConfig]:
        """The sources, one where `path` names it; none where nothing does."""
        if self.sources is not None:
            return self.sources
        return [] if self.path is None else [SourceConfig(path=self.path)]  # type: ignore[call-arg]


RateFactor = Annotated[float, Field(ge=1e-6, le=1_000_000)]


class OptimizerConfig(Section):
    """The optimizer; AdamW decays matrices only."""

    name: Literal["adamw", "adam"] = Field(
        "adamw", description="`adamw`, or the `adam` of the paper (which has no weight decay)."
    )
    learning_rate: Annotated[float, Field(ge=1e-30, le=1000)] = Field(
        4e-4, description="Peak learning rate."
    )
    learning_rate_by_level: RateFactor | list[RateFactor] = Field(
        1.0, description="Factor on the learning rate, by level; embedding and head are level 0."
    )
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.95], description="Decay of the first and the second moment."
    )
    eps: Annotated[float, Field(ge=1e-30, le=1)] = Field(  # fp32 ends at 1e-38
        1e-8, description="Added to the root of the second moment."
    )
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = Field(
        0.1, description="Decoupled weight decay of all matrices (not of norms and biases)."
    )
    gradient_clipping: Annotated[float, Field(ge=0, le=1e30)] = Field(
        1.0, description="Largest global gradient norm; 0 switches clipping off."
    )


class ScheduleConfig(Section):
    """Learning rate by step: warm-up, then one of three shapes."""

    kind: Literal["cosine", "rsqrt", "wsd"] = Field(
        "cosine",
        description="After the warm-up: one `cosine`, 1/sqrt (`rsqrt`), or stable-then-decay "
        "(`wsd`).",
    )
    warmup_steps: NonNegative = Field(0, description="Steps of linear warm-up.")
    decay_steps: NonNegative = Field(
        0, description="`wsd`, `rsqrt`: the last steps, in which the rate falls."
    )
    decay_shape: Literal["linear", "sqrt"] = Field(
        "linear", description="`wsd`: shape of the decay, linear or 1 - sqrt."
    )
    cycle_steps: Positive | None = Field(
        None,
        description="`cosine`: length of the half wave, counted after the warm-up. Default: "
        "`training.steps`, as in the paper (the rate then ends a little above its minimum).",
    )
    minimum_ratio: Fraction = Field(
        0.0, description="Lowest rate after the warm-up as a fraction of the peak."
    )


class ParallelConfig(Section):
    """How the model is spread; data parallelism is what is left of the processes."""

    tensor: Positive = Field(1, description="Tensor-parallel size (Megatron's layers).")
    pipeline: Positive = Field(1, description="Pipeline stages, cut by FLOPs.")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(
        1, description="DeepSpeed ZeRO stage. Pipelines allow 0 and 1, bf16 allows 1 to 3."
    )
    timeout: Seconds = Field(
        600.0,
        description="Seconds that ranks wait for each other within a step before the run ends as "
        "lost; half an hour at the start, and around saves and validations.",
    )
    elastic: bool = Field(
        False,
        description="Where the number of processes does not fit, go on in the nearest layout that "
        "keeps `training.global_batch_size`; under `slurm/*.sh` also on fewer of them.",
    )


class TrainingConfig(Section):
    """The loop."""

    steps: Positive = Field(1000, description="Optimizer steps of the whole schedule.")
    global_batch_size: Positive = Field(8, description="Windows an optimizer step.")
    micro_batch_size: Positive = Field(
        1, description="Windows a forward pass of one data-parallel rank."
    )
    precision: Precision = Field(
        "bf16", description="`bf16` (fp32 master weights under ZeRO) or `fp32`."
    )
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = Field(
        DEFAULT_SEED,
        description="Fixes initial weights, order of the data, and dropout in every layout.",
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
        ["TERM", "USR1", "USR2"],
        description="Signals on which a run finishes its step, saves and ends with exit code 75.",
    )
    stop_margin: Annotated[float, Field(ge=0, le=10_000_000)] = Field(
        60.0,
        description="Where the end of the job is known (`slurm/*.sh`): seconds to spare when the "
        "run ends by itself, beside those of a step, a save and a validation that is due.",
    )


class GuardConfig(Section):
    """Bad steps, which are skipped: their update is not made."""

    spike_sigma: Annotated[float, Field(ge=0.001, le=1_000_000)] | None = Field(
        None,
        description="A step whose loss lies more than so many standard deviations above the mean "
        "of the last losses is skipped, as one with a loss or gradients that are not finite "
        "always is. null: no loss is too high.",
    )
    window: Annotated[int, Field(ge=4, le=1_000_000)] = Field(
        128,
        description="Steps to look back on: the losses that `guard.spike_sigma` judges by, from "
        "the time there are half as many, and the steps in which `guard.max_skipped` counts.",
    )
    max_skipped: NonNegative = Field(
        10,
        description="Steps that may be skipped among the last `guard.window`; one more, and the "
        "run gives up.",
    )


class CheckpointConfig(Section):
    """Saving and resuming."""

    every: NonNegative = Field(0, description="Steps between checkpoints; 0: after the last only.")
    keep_last: NonNegative = Field(
        0, description="How many of the newest whole checkpoints are kept; 0: all."
    )
    keep_every: NonNegative = Field(
        0,
        description="`keep_last`: checkpoints whose step is a multiple of this are kept as well; "
        "0: none.",
    )
    async_: bool = Field(
        True,
        alias="async",
        description="Training waits for the copy to host memory only, and goes on while that is "
        "written. It takes host memory for what the rank writes, 12 bytes for each parameter in "
        "its share of the optimizer. false: training waits for the disk.",
    )
    start_from: str | None = Field(
        None,
        description="A checkpoint folder, or a run folder (its newest whole checkpoint), to begin "
        "from where the run folder has none yet: weights, optimizer, step and data position carry "
        "over. With `schedule.kind = wsd` and a new "
        "`training.steps` this branches a decay off any checkpoint.",
    )


class WatchdogConfig(Section):
    """A run that hangs is ended, so that it is started again; slow ranks are named."""

    factor: Ratio = Field(
        10.0,
        description="A step that takes so many times the median of the recent ones hangs: the "
        "ranks write their stacks to `RUN/stacks`, name who had not arrived, and end with 76. "
        "0: nothing is ended.",
    )
    at_least: Seconds = Field(
        300.0,
        description="Seconds below which no step hangs, however short the others are. More than "
        "reading data may take with all its retries (`data.timeout`, `data.retries`).",
    )
    first: Seconds = Field(
        1800.0, description="Seconds that each of a start's first three steps may take."
    )
    pause: Seconds = Field(
        3600.0, description="Seconds that the start, a validation, a save or the end may take."
    )
    slow_rank: Ratio = Field(
        1.3,
        description="A rank that needs so many times the median by itself, in five logged steps "
        "in a row, says so. 0: never.",
    )


class LoggingConfig(Section):
    """What is recorded; `metrics.jsonl` in the run folder always is."""

    every: Positive = Field(10, description="Steps between logged lines.")
    wandb_project: str | None = Field(
        None, description="Weights & Biases project; null: not used. Offline without an API key."
    )
    wandb_name: str | None = Field(
        None, description="Name of the run there; null: the run folder's name."
    )


class Config(Section):
    """A whole configuration."""

    schema_version: Literal[1] = Field(1, description="Version of this schema.")
    notes: str = Field("", description="Free text: what this is for, where its numbers come from.")
    model: ModelConfig = Field(default_factory=ModelConfig)  # type: ignore[arg-type]
    data: DataConfig = Field(default_factory=DataConfig)  # type: ignore[arg-type]
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)  # type: ignore[arg-type]
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)  # type: ignore[arg-type]
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)  # type: ignore[arg-type]
    training: TrainingConfig = Field(default_factory=TrainingConfig)  # type: ignore[arg-type]
    guard: GuardConfig = Field(default_factory=GuardConfig)  # type: ignore[arg-type]
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)  # type: ignore[arg-type]
    watchdog: WatchdogConfig = Field(default_factory=WatchdogConfig)  # type: ignore[arg-type]
    logging: LoggingConfig = Field(default_factory=LoggingConfig)  # type: ignore[arg-type]
    deepspeed: ExpertKeys = Field(default_factory=ExpertKeys)  # type: ignore[arg-type]

    @field_validator("schema_version", mode="before")
    @classmethod
    def _version_is_a_number(cls, value: Any) -> Any:
        if type(value) is not int:  # true and 1.0 are equal to 1
            raise ValueError("expected 1")
        return value

    def data_parallel(self, world_size: int) -> int:
        """Data-parallel size in a world of `world_size` processes."""
        return world_size // (self.parallel.tensor * self.parallel.pipeline)

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches an optimizer step on each data-parallel rank (gradient accumulation)."""
        ranks = self.data_parallel(world_size)
        return self.training.global_batch_size // (self.training.micro_batch_size * ranks)
