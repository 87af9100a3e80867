"""The section `data`: corpora, and how they are read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hg_scale.config.section import NonNegative, Seconds, Section


class SourceConfig(Section):
    """One of several corpora."""

    path: str = Field(description="As `data.path`.")
    weight: Annotated[float, Field(ge=1e-6, le=1e15)] = Field(
        1.0, description="Share of the training sequences, relative to the other sources' weights."
    )
    when_exhausted: Literal["repeat", "retire"] = Field(
        "repeat",
        description="After its last sequence: `repeat` it from the start, or `retire` it and leave "
        "its share to the others.",
    )
    name: str | None = Field(
        None, description="Name in logs and metrics; null: the last part of its path."
    )

    @property
    def label(self) -> str:
        """The name of the source in logs and metrics."""
        return self.name or self.path.partition("{}")[0].rstrip("/").rpartition("/")[2]


class DataConfig(Section):
    """Where the tokens come from, and how they are read."""

    path: str | None = Field(
        None,
        description="Folder with `index.json` and the shards, as written by `data_prep/*.py`; or "
        "an `http(s)://` URL; or `pipe:COMMAND {}`, where `{}` stands for the file. A relative "
        "path is relative to the current folder.",
    )
    sources: Annotated[list[SourceConfig], Field(min_length=1)] | None = Field(
        None,
        description="Several corpora instead of `data.path`. Sequences are drawn in exact "
        "proportion to their weights.",
    )
    tokenizer: str | None = Field(
        None,
        description="Tokenizer that the data must have been prepared with: its name in the index, "
        "or the beginning of its checksum. null: any.",
    )
    workers: Annotated[int, Field(ge=0, le=1000)] = Field(
        0, description="Processes that read ahead for each rank that reads; 0: a thread."
    )
    prefetch_mb: NonNegative = Field(
        64,
        description="Megabytes of tokens that each rank reads ahead, in their stored size (1, 2 or "
        "4 bytes each); 0: only what the next batches need.",
    )
    retries: NonNegative = Field(3, description="Retries of a failed read, after growing pauses.")
    timeout: Seconds = Field(
        60.0, description="Seconds without a byte after which a read from a URL or pipe fails."
    )
    on_fault: Literal["stop", "skip"] = Field(
        "stop",
        description="What to do about a missing, truncated or corrupt shard: `stop` the run, or "
        "`skip` the sequences in it, which are masked out of the loss and recorded.",
    )
    max_skipped: NonNegative = Field(
        1000, description="`on_fault` = `skip`: sequences that a run may skip before it stops."
    )

    @property
    def corpora(self) -> list[SourceConfig]:
        """The sources, or the one that `path` names; empty without either."""
        if self.sources is not None:
            return self.sources
        return [] if self.path is None else [SourceConfig(path=self.path)]
