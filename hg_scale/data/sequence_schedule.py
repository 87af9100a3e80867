"""The order of training sequences over all sources: a pure function of (state, sequences consumed).

    mixture   selects the source of each sequence, in exact proportion to the weights;
    order     locates the sequence in that source (`order.py`).

A source's own order does not depend on the other sources. A checkpoint stores a `DataState`: while
neither the sequence length nor the sources change, only its number of sequences grows; at a change
the old numbers, one or two per source, are kept as that source's history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from hg_scale.bounded_read import Count, FormatError, validated
from hg_scale.data.errors import DataError
from hg_scale.data.index import Index
from hg_scale.data.mixture import Mixture
from hg_scale.data.order import Int64Array, SequenceOrder

# [sequence length, sequences served at it], ...
History = list[Annotated[list[Count], Field(min_length=2, max_length=2)]]


@dataclass(frozen=True)
class DataSource:
    """A prepared corpus to train on. `repeat`: for many epochs; otherwise it retires after one."""

    name: str
    index: Index
    weight: float = 1.0
    repeat: bool = True

    @property
    def start_token(self) -> int:
        """The input before a document's first token: the end-of-document id, or 0 without one."""
        return self.index.eod or 0

    def is_aligned(self, sequence_length: int) -> bool:
        """Whether a sequence of this length is exactly one document (an image)."""
        return self.index.document_tokens == sequence_length


@dataclass(frozen=True)
class DataState:
    """A run's position in its data, in plain values; sources are keyed by their index's identity.

    The field names are those of the checkpoint manifest; `windows` and `served` count sequences.
    """

    sequence_length: Count
    mixture: list[list[str | int | float | bool]]  # [identity, weight, repeat] of the sources
    windows: Count = 0  # served at this length from this mixture
    served: dict[str, Count] = field(default_factory=dict)  # of these, by source
    before: dict[str, History] = field(default_factory=dict)  # served earlier, by source
    tokenizer: dict[str, Any] = field(default_factory=dict)
    skipped: list[list[Any]] = field(default_factory=list)  # [sequence of the run, shard], ...

    @property
    def sequences_before(self) -> int:
        """Number of sequences served before those of the current mixture and length."""
        return sum(count for history in self.before.values() for _, count in history)

    def histories(self) -> dict[str, History]:
        """Return all that was served, by source."""
        histories = {key: [[*entry] for entry in history] for key, history in self.before.items()}
        for identity, count in self.served.items():
            history = histories.setdefault(identity, [])
            if history and history[-1][0] == self.sequence_length:
                history[-1][1] += count
            elif count:
                history.append([self.sequence_length, count])
        return histories


def parse_data_state(tree: dict[str, Any]) -> DataState:
    """Return the state of the data in a manifest. Raises DataError, one line, if it is none."""
    try:
        return validated(DataState, tree, ("progress", "data"))
    except FormatError as error:
        raise DataError(f"the checkpoint's manifest: {error}; use another checkpoint") from None


class SequenceLocations(NamedTuple):
    """Where sequences are stored: arrays (n,) of source, and epoch, stream and number in it."""

    source: Int64Array
    epoch: Int64Array
    stream: Int64Array
    number: Int64Array


class DataSchedule:
    """The sequences of a run, from `state` on or from the start.

    Raises DataError where a source has no sequence of this length, or its tokenizer differs from
    that of the state or of the other sources.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        *,
        sequence_length: int,
        seed: int,
        state: DataState | None = None,
        position: int = 0,
    ) -> None:
        """`position`: tokens consumed, used only where there is no `state`."""
        if position < 0:
            raise DataError(f"the data position is {position}: expected 0 or more tokens")
        self.sources, self.sequence_length = list(sources), sequence_length
        self._identities = [source.index.identity for source in sources]
        mixture: list[list[str | int | float | bool]] = [
            [identity, source.weight, source.repeat]
            for identity, source in zip(self._identities, sources, strict=True)
        ]
        fresh = DataState(sequence_length, mixture, position // sequence_length)
        tokenizer = self._common_tokenizer(state)
        if state is None:
            state = fresh
        known = {entry[0] for entry in state.mixture if entry} | state.before.keys()
        self.new_sources = [  # names of the sources that the state does not know
            source.name
            for source, identity in zip(sources, self._identities, strict=True)
            if identity not in known
        ]
        if (state.sequence_length, state.mixture) != (sequence_length, mixture):
            before = state.histories()
            state = DataState(sequence_length, mixture, before=before, skipped=state.skipped)
        self._state = replace(state, tokenizer=tokenizer)
        self.first_sequence = state.windows
        histories = [state.before.get(identity, []) for identity in self._identities]
        self.orders = [
            make_order(source, sequence_length, seed, history)
            for source, history in zip(sources, histories, strict=True)
        ]
        # Sequences of each order that were served before those of this mixture.
        self._served = [h[-1][1] if h and h[-1][0] == sequence_length else 0 for h in histories]
        limits = [
            None if source.repeat else max(0, order.first_epoch_sequences - served)
            for source, order, served in zip(sources, self.orders, self._served, strict=True)
        ]
        self._mixture = Mixture([source.weight for source in sources], limits)

    def coverage(self) -> dict[str, float]:
        """Return, by source, the fraction of its training tokens that are labels in an epoch."""
        return {
            source.name: order.sequences_per_epoch
            * self.sequence_length
            / source.index.split("train").tokens
            for source, order in zip(self.sources, self.orders, strict=True)
        }

    @property
    def sequences(self) -> int | None:
        """Number of sequences in all, counted as `first_sequence` is; None: without end."""
        return self._mixture.sequences

    def locate(self, first: int, count: int) -> SequenceLocations:
        """Return the locations of sequences first to first + count - 1.

        Raises DataError where the data ends before.
        """
        sources, numbers = self._mixture.locate(first, count)
        if len(sources) < count:
            raise DataError(
                f"the data ends after {self.sequences} sequences of {self.sequence_length} tokens: "
                "all sources are retired; train fewer steps, or let one repeat (data.sources)"
            )
        parts = np.empty((3, count), np.int64)
        for i, (order, served) in enumerate(zip(self.orders, self._served, strict=True)):
            selected = np.flatnonzero(sources == i)
            if len(selected):
                parts[:, selected] = order.locate(served + int(numbers[selected[0]]), len(selected))
        return SequenceLocations(sources, *parts)

    def shard_name(self, sequence: int) -> str:
        """Return source and file name of the shard that a sequence is in."""
        source, *location = (int(part[0]) for part in self.locate(sequence, 1))
        index = self.sources[source].index
        shard = index.split("train").shards[self.orders[source].block(*location).shard]
        return f"{self.sources[source].name}/{shard.file}"

    def number_in_run(self, sequence: int) -> int:
        """Return the number of a sequence among all of the run, earlier lengths included."""
        return self._state.sequences_before + sequence

    def tokens(self, sequences: int) -> int:
        """Return the tokens consumed by the run after `sequences`, earlier lengths included."""
        before = self._state.before.values()
        earlier = sum(length * count for history in before for length, count in history)
        return earlier + sequences * self.sequence_length

    def epochs(self, sequences: int) -> dict[str, float]:
        """Return the epochs of each source after `sequences`, with fractions."""
        counts = self._mixture.counts(sequences)
        sources = zip(self.sources, self.orders, self._served, counts, strict=True)
        return {
            source.name: order.epochs(served + count) for source, order, served, count in sources
        }

    def state(self, sequences: int, skipped: list[list[Any]]) -> DataState:
        """Return the state after `sequences`."""
        counts = self._mixture.counts(sequences)
        served = dict(zip(self._identities, counts, strict=True))
        return replace(self._state, windows=sequences, served=served, skipped=skipped)

    def _common_tokenizer(self, state: DataState | None) -> dict[str, Any]:
        """Return the tokenizer of all sources, which must also be that of the state."""
        owner, expected = "the checkpoint", state.tokenizer if state else {}
        for source in self.sources:
            found = source.index.tokenizer.model_dump()
            if expected and found != expected:
                raise DataError(
                    f"{source.index.shown}: its tokenizer ({_describe(found)}) differs from "
                    f"that of {owner} ({_describe(expected)}); prepare it again with that one"
                )
            owner, expected = self.sources[0].index.shown, found
        return expected


def make_order(source: DataSource, length: int, seed: int, history: History) -> SequenceOrder:
    """Return a source's order for sequences of `length` tokens, after its history.

    Where the history ends with the same length, sequence 0 is the first one of that length.
    """
    index, split = source.index, source.index.split("train")
    document = index.document_tokens
    if document and any(shard.tokens % document for shard in split.shards):
        raise DataError(
            f"{index.shown}: a shard does not end with a document of {document} tokens; prepare "
            "the data again"
        )
    lengths = [entry[0] for entry in history] + [length]
    if len(lengths) > 1 and lengths[-2] == length:
        lengths.pop()
    order = SequenceOrder(
        [shard.tokens for shard in split.shards],
        sequence_length=lengths[0],
        seed=seed,
        aligned=source.is_aligned(lengths[0]),
    )
    for (_, served), later in zip(history, lengths[1:], strict=False):
        order = order.rechunk(served, sequence_length=later, aligned=source.is_aligned(later))
    return order


def _describe(tokenizer: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in tokenizer.items())
