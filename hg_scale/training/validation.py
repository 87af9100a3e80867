"""Validation text: each token of each source's split scored once, whatever the layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hg_scale.config.constants import IGNORED_LABEL
from hg_scale.config.schema import Config
from hg_scale.data.errors import DataError
from hg_scale.data.evaluation import evaluation_windows, split_bytes
from hg_scale.data.index import Index
from hg_scale.data.schedule import DataSource
from hg_scale.data.shards import SplitReader
from hg_scale.parallel.mesh import Mesh
from hg_scale.training.agreement import raise_on_all_ranks
from hg_scale.training.corpora import patience


@dataclass(frozen=True)
class ValidationText:
    """What is scored of one source, and the text it stands for.

    `counted`: `bytes` is exact; of a part of a split it is its share at first.
    """

    source: DataSource
    tokens: int
    bytes: float
    counted: bool = True

    @property
    def index(self) -> Index:
        return self.source.index


class Validator:
    """A split of all sources that have it: batches for this rank, and what they stand for.

    With several sources each is scored by itself, `training.validation_windows` windows of it.
    The whole is their mean by the weights of the mixture: the loss that training works on.
    """

    def __init__(
        self,
        config: Config,
        sources: list[DataSource],
        mesh: Mesh,
        device: torch.device,
        split: str,
    ) -> None:
        self.config, self.mesh, self.device, self.split = config, mesh, device, split
        self._fault: DataError | None = None
        limit, length = config.training.validation_windows, config.model.sequence_length
        self.parts = []
        for source in sources:
            if split not in source.index.splits or not source.index.splits[split].tokens:
                continue
            whole = source.index.split(split).tokens
            tokens = min(whole, limit * length) if limit else whole
            share = split_bytes(source.index, split) * tokens / whole
            self.parts.append(ValidationText(source, tokens, share, tokens == whole))

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    def count(self, part: ValidationText) -> int:
        """Batches of a part, on every rank."""
        length, rows = self.config.model.sequence_length, self.config.training.micro_batch_size
        return -(-part.tokens // (length * rows * self.mesh.data))

    def batches(self, part: ValidationText) -> Iterator[tuple[Tensor, Tensor] | None]:
        """(ids, labels), each (micro_batch_size, L), as many on every rank.

        None on ranks that need no tokens. Where reading fails, batches without labels take the
        place of what is missing, so that no rank waits for this one: then call `settle`.
        """
        length, rows = self.config.model.sequence_length, self.config.training.micro_batch_size
        count = self.count(part)
        if not (self.mesh.is_first_stage or self.mesh.is_last_stage):
            yield from [None] * count
            return
        windows = evaluation_windows(
            part.index,
            self.split,
            sequence_length=length,
            rows=rows,
            data_rank=self.mesh.data_rank,
            data_size=self.mesh.data,
            limit_windows=self.config.training.validation_windows,
            patience=patience(self.config),
        )
        nothing = np.stack([np.zeros((rows, length)), np.full((rows, length), IGNORED_LABEL)])
        for _ in range(count):
            pair = nothing.astype(np.int64)
            if self._fault is None:
                try:
                    pair = np.stack(next(windows))
                except DataError as error:
                    self._fault = error
            both = torch.from_numpy(pair).to(self.device)
            yield both[0], both[1]

    def settle(self) -> None:
        """Raise on all ranks where one could not read. A collective operation of all ranks."""
        if self.mesh.rank == 0 and self._fault is None:  # the rank that writes the record
            try:
                self.parts = [part if part.counted else self._count(part) for part in self.parts]
            except DataError as error:
                self._fault = error
        raise_on_all_ranks(self._fault, self.device)

    def _count(self, part: ValidationText) -> ValidationText:
        """The part with the bytes that its tokens stand for, read once."""
        reader = SplitReader(part.index, self.split, patience(self.config))
        tokenizer, length, size = part.index.open_tokenizer(), 1 << 20, 0
        for start in range(0, part.tokens, length):
            stop = min(start + length, part.tokens)
            size += tokenizer.count_bytes(reader.read(start, stop))
        return replace(part, bytes=size, counted=True)

    def record(self, nats: list[float]) -> dict[str, Any]:
        """What a validation says: the sum of the losses of each part, in nats, in their order."""
        weight = sum(part.source.weight for part in self.parts)
        losses = [total / part.tokens for total, part in zip(nats, self.parts, strict=True)]
        shares = [part.source.weight / weight for part in self.parts]
        loss = sum(share * loss for share, loss in zip(shares, losses, strict=True))
        size = sum(s * p.bytes / p.tokens for s, p in zip(shares, self.parts, strict=True))
        record: dict[str, Any] = {
            "validation_loss": loss,
            "validation_bits_per_byte": loss / log(2) / size,
            "validation_tokens": self.tokens,
        }
        if len(self.parts) > 1:
            names = [part.source.name for part in self.parts]
            record["validation_loss_by_source"] = dict(zip(names, losses, strict=True))
        return record
