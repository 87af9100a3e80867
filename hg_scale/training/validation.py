"""Validation batches: every token of each source's split scored once, in any layout."""

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
from hg_scale.data.evaluation import evaluation_batches, split_bytes
from hg_scale.data.index import Index
from hg_scale.data.sequence_schedule import DataSource
from hg_scale.data.shards import SplitReader
from hg_scale.parallel.mesh import Mesh
from hg_scale.training.agreement import raise_on_all_ranks
from hg_scale.training.corpora import retry_policy


@dataclass(frozen=True)
class ValidationPart:
    """The first `tokens` of one source's split, and the number of bytes that they decode to.

    `exact`: `bytes` is counted; otherwise it is estimated from the bytes of the complete split.
    """

    source: DataSource
    tokens: int
    bytes: float
    exact: bool = True

    @property
    def index(self) -> Index:
        return self.source.index


class Validator:
    """One split of all sources that have it: this rank's batches, and the record for the metrics.

    Each source is a part and scored on its own, on its first `training.validation_windows`
    sequences. The validation loss is their mean, weighted as in the mixture: the loss that training
    minimises.
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
        self._error: DataError | None = None
        self._length = config.model.sequence_length
        self._batch_size = config.training.micro_batch_size
        limit = config.training.validation_windows
        self.parts = []
        for source in sources:
            if split not in source.index.splits or not source.index.splits[split].tokens:
                continue
            total = source.index.split(split).tokens
            tokens = min(total, limit * self._length) if limit else total
            size = split_bytes(source.index, split) * tokens / total
            self.parts.append(ValidationPart(source, tokens, size, tokens == total))

    @property
    def tokens(self) -> int:
        """Number of tokens scored, over all parts and ranks."""
        return sum(part.tokens for part in self.parts)

    def count(self, part: ValidationPart) -> int:
        """Return the number of batches of a part, the same on every rank."""
        return -(-part.tokens // (self._length * self._batch_size * self.mesh.data))

    def batches(self, part: ValidationPart) -> Iterator[tuple[Tensor, Tensor] | None]:
        """Yield (ids, labels), each (micro_batch_size, L); as many on every rank.

        Yields None on ranks that need no tokens. After a read error it yields batches without
        labels, so that no rank waits for this one; `settle` then raises.
        """
        count = self.count(part)
        if not (self.mesh.is_first_stage or self.mesh.is_last_stage):
            yield from [None] * count
            return
        batches = evaluation_batches(
            part.index,
            self.split,
            sequence_length=self._length,
            batch_size=self._batch_size,
            data_rank=self.mesh.data_rank,
            data_size=self.mesh.data,
            max_sequences=self.config.training.validation_windows,
            retry_policy=retry_policy(self.config),
        )
        shape = self._batch_size, self._length
        without_labels = np.stack(
            [np.zeros(shape, np.int64), np.full(shape, IGNORED_LABEL, np.int64)]
        )
        for _ in range(count):
            pair = without_labels
            if self._error is None:
                try:
                    pair = np.stack(next(batches))
                except DataError as error:
                    self._error = error
            ids, labels = torch.tensor(pair, device=self.device)
            yield ids, labels

    def settle(self) -> None:
        """End a validation: raise on all ranks if one could not read. A collective."""
        if self.mesh.rank == 0 and self._error is None:  # rank 0 writes the record
            try:
                self.parts = [part if part.exact else self._count(part) for part in self.parts]
            except DataError as error:
                self._error = error
        raise_on_all_ranks(self._error, self.device)

    def _count(self, part: ValidationPart) -> ValidationPart:
        """Return the part with its bytes counted."""
        reader = SplitReader(part.index, self.split, retry_policy(self.config))
        tokenizer, chunk, size = part.index.open_tokenizer(), 1 << 20, 0
        for start in range(0, part.tokens, chunk):
            stop = min(start + chunk, part.tokens)
            size += tokenizer.count_bytes(reader.read(start, stop))
        return replace(part, bytes=size, exact=True)

    def record(self, nats: list[float]) -> dict[str, Any]:
        """Return the record for metrics.jsonl; `nats` is the sum of the losses of each part."""
        weight = sum(part.source.weight for part in self.parts)
        losses = [total / part.tokens for total, part in zip(nats, self.parts, strict=True)]
        shares = [part.source.weight / weight for part in self.parts]
        loss = sum(share * loss for share, loss in zip(shares, losses, strict=True))
        bytes_per_token = sum(
            share * part.bytes / part.tokens for share, part in zip(shares, self.parts, strict=True)
        )
        record: dict[str, Any] = {
            "validation_loss": loss,
            "validation_bits_per_byte": loss / log(2) / bytes_per_token,
            "validation_tokens": self.tokens,
        }
        if len(self.parts) > 1:
            names = [part.source.name for part in self.parts]
            record["validation_loss_by_source"] = dict(zip(names, losses, strict=True))
        return record
