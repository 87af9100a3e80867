"""The schema of `configs/*.json`: the section `model`, and all sections together.

Each section is one pydantic model. `docs/config.md` and the JSON Schema for editors are generated
from the descriptions of the fields. Checks that involve several keys are in `checks.py` and the
files it imports.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from hg_scale.config.data_section import DataConfig
from hg_scale.config.expert_keys import ExpertKeys
from hg_scale.config.hierarchy import Hierarchy
from hg_scale.config.resampling_kind import (
    POOLING_SHORTHAND,
    UPSAMPLING_SHORTHAND,
    Pooling,
    ResamplingKind,
    Upsampling,
)
from hg_scale.config.section import Fraction, Positive, Section, Width
from hg_scale.config.training_sections import (
    CheckpointConfig,
    GuardConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainingConfig,
    WatchdogConfig,
)

SCHEMA_VERSION = 1

# A value for every level, or one value for all; lists run from the outermost level inwards.
WidthByLevel = Width | Annotated[list[Width], Field(min_length=1)]

Positions = Literal["relative", "rotary"]

# Keys of the model that its weights do not depend on: a resumed run may change them.
FREE_MODEL_KEYS = frozenset(
    {"sequence_length", "dropout", "shorten_factor_choices", "initialization"}
)


class ModelConfig(Section):
    """The Hourglass. Lists by level run from the outermost level (full length) inwards."""

    hierarchy: str = Field(
        "2@1 8@3 2@1",
        description="Blocks and total shortening factors in the paper's notation: `2@1 8@3 2@1` is "
        "2 blocks at full length, 8 on a sequence three times shorter, 2 at full length. `6@1` is "
        "a flat Transformer of 6 blocks.",
    )
    vocab_size: Annotated[int, Field(ge=1, le=100_000_000)] = Field(
        256, description="Token ids run from 0 to vocab_size - 1."
    )
    vocab_multiple: Width = Field(
        64,
        description="The vocabulary of embedding and head is padded to a multiple of this, so that "
        "every `parallel.tensor` gives the same model; padded logits are masked.",
    )
    sequence_length: Positive = Field(2046, description="Tokens in a training sequence.")
    d_model: WidthByLevel = Field(512, description="Model width, by level.")
    heads: WidthByLevel = Field(8, description="Attention heads, by level.")
    d_ff: WidthByLevel = Field(2048, description="Hidden width of the feed-forward, by level.")
    window: Positive | list[Positive | None] | None = Field(
        None,
        description="Sliding attention window, by level, in positions of that level: a position "
        "sees itself and the window - 1 before it. null: full causal attention.",
    )
    pooling: Pooling = Field(
        "attention+average",
        description="How groups of positions are shortened. `attention+X`: attention over the "
        "longer sequence with queries from X; `attention` is short for `attention+average`.",
    )
    upsampling: Upsampling = Field(
        "attention+repeat",
        description="How groups are expanded again. `attention+X`: attention over the shorter "
        "sequence with queries from X plus the skip; `attention` is short for "
        "`attention+repeat`.",
    )
    skip: Literal["add", "learned"] = Field(
        "add",
        description="Skip connection around a level: `add` as in the paper, `learned` with one "
        "trained gain per feature, initially 1.",
    )
    positions: Positions | list[Positions] = Field(
        "relative",
        description="Transformer-XL's `relative` positions as in the paper, or `rotary` "
        "embeddings; by level. Resampling attention uses the kind of the longer sequence.",
    )
    shared_position_bias: bool = Field(
        False,
        description="One pair of relative-position biases for the complete model, as in the paper, "
        "instead of one pair per layer.",
    )
    rotary_base: Annotated[float, Field(ge=1, le=1e12)] = Field(
        10_000.0, description="Base of the rotary frequencies."
    )
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="Kind of all norms.")
    # The backward pass takes powers of it: those of smaller numbers underflow in fp32.
    norm_eps: Annotated[float, Field(ge=1e-20, le=1)] = Field(
        1e-6, description="Epsilon of all norms."
    )
    activation: Literal["gelu", "swiglu"] = Field(
        "gelu",
        description="Feed-forward: GELU (tanh form), or gated SiLU (three matrices).",
    )
    qk_norm: bool = Field(
        False, description="RMS-normalise the queries and keys of each head, with a trained scale."
    )
    bias: bool = Field(True, description="Biases in linear layers.")
    dropout: Fraction = Field(
        0.0,
        description="Dropout rate after the embedding, on attention probabilities, after "
        "attention, and inside and after the feed-forward.",
    )
    shorten_factor_choices: (
        Annotated[list[Width], Field(min_length=1)]
        | Annotated[list[Annotated[list[Width], Field(min_length=1)]], Field(min_length=1)]
        | None
    ) = Field(
        None,
        description="Shorten-factor dropout (paper, section 4.1): each training step draws the "
        "factor of every shortening from these; one list for all, or one list per shortening. "
        "Evaluation uses the factors of `hierarchy`.",
    )
    initialization: Literal["paper", "scaled_normal"] = Field(
        "paper",
        description="`paper`: Glorot-uniform matrices, biases of 1e-6, as the authors' code. "
        "`scaled_normal`: normal with standard deviation 1 for embeddings, 1 / sqrt(fan-in) for "
        "matrices, the last one of each residual branch divided by sqrt(2 x blocks).",
    )

    @field_validator("pooling", mode="before")
    @classmethod
    def _pooling_shorthand(cls, value: Any) -> Any:
        return POOLING_SHORTHAND.get(value, value) if isinstance(value, str) else value

    @field_validator("upsampling", mode="before")
    @classmethod
    def _upsampling_shorthand(cls, value: Any) -> Any:
        return UPSAMPLING_SHORTHAND.get(value, value) if isinstance(value, str) else value

    @field_validator("hierarchy")
    @classmethod
    def _hierarchy_parses(cls, value: str) -> str:
        Hierarchy.parse(value)
        return value

    @cached_property
    def parsed(self) -> Hierarchy:
        """The parsed hierarchy."""
        return Hierarchy.parse(self.hierarchy)

    @cached_property
    def pooling_kind(self) -> ResamplingKind:
        """The parsed pooling."""
        return ResamplingKind.parse(self.pooling)

    @cached_property
    def upsampling_kind(self) -> ResamplingKind:
        """The parsed upsampling."""
        return ResamplingKind.parse(self.upsampling)

    @property
    def padded_vocab(self) -> int:
        """Vocabulary size of embedding and head, padded."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def by_level(self, key: str) -> list[Any]:
        """Return the values of a by-level key, one per level, outermost first."""
        return by_level(getattr(self, key), self.parsed.level_count)

    @cached_property
    def factor_choices(self) -> list[list[int]] | None:
        """The lists that shorten-factor dropout draws from, one per shortening."""
        choices = self.shorten_factor_choices
        if choices is None:
            return None
        if isinstance(choices[0], list):
            return choices
        return [choices] * len(self.parsed.shortenings)


def by_level(value: Any, levels: int) -> list[Any]:
    """Return a by-level value as a list with one entry per level."""
    return list(value) if isinstance(value, list) else [value] * levels


class Config(Section):
    """A complete configuration."""

    schema_version: Literal[1] = Field(1, description="Version of this schema.")
    notes: str = Field("", description="Free text: purpose, and sources of the numbers.")
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = Field(default_factory=WatchdogConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    deepspeed: ExpertKeys = Field(default_factory=ExpertKeys)

    @field_validator("schema_version", mode="before")
    @classmethod
    def _version_is_a_number(cls, value: Any) -> Any:
        if type(value) is not int:  # true and 1.0 are equal to 1
            raise ValueError("expected 1")
        return value

    def data_parallel(self, world_size: int) -> int:
        """Return the data-parallel size in a world of `world_size` processes."""
        return world_size // (self.parallel.tensor * self.parallel.pipeline)

    def micro_batches(self, world_size: int) -> int:
        """Return the micro-batches per optimizer step and data-parallel rank."""
        ranks = self.data_parallel(world_size)
        return self.training.global_batch_size // (self.training.micro_batch_size * ranks)
