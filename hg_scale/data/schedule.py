"""Which windows come when, over all sources: a pure function of (state, windows consumed).

    mixture   says from which source the next window is, by exact shares;
    order     says where in the source it lies (`order.py`).

A source's own order does not depend on the others. What a checkpoint carries is a `DataState`:
while neither the sequence length nor the sources change, only the number of windows in it grows;
at a change the old numbers, one or two a source, are kept as the source's history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from hg_scale.data.errors import DataError
from hg_scale.data.index import Index
from hg_scale.data.mixture import Mixture
from hg_scale.data.order import Ints, WindowOrder

History = list[list[int]]  # [sequence length, windows served at it], ...


@dataclass(frozen=True)
class DataSource:
    """A prepared corpus to train on. `repeat`: again and again; else until its first pass ends."""

    name: str
    index: Index
    weight: float = 1.0
    repeat: bool = True

    @property
    def start(self) -> int:
        """The input before the first token of a document: its end's id, or 0 where none is."""
        return self.index.eod or 0

    def aligned(self, sequence_length: int) -> bool:
        """Whether a window is one document: an image, and the windows are as long."""
        return self.index.document_tokens == sequence_length


@dataclass(frozen=True)
class DataState:
    """Where a run stands in its data; plain values. Sources go by their index's identity."""

    sequence_length: int
    mixture: list[list[Any]]  # [identity, weight, repeat] of the sources that take turns
    windows: int = 0  # served since they do, at this length
    served: dict[str, int] = field(default_factory=dict)  # of these, by source
    before: dict[str, History] = field(default_factory=dict)  # what was served earlier, by source
    tokenizer: dict[str, Any] = field(default_factory=dict)
    skipped: list[list[Any]] = field(default_factory=list)  # [window of the run, shard], ...

    @property
    def windows_before(self) -> int:
        return sum(windows for history in self.before.values() for _, windows in history)

    def histories(self) -> dict[str, History]:
        """All that was served, by source."""
        whole = {identity: [list(cut) for cut in cuts] for identity, cuts in self.before.items()}
        for identity, windows in self.served.items():
            history = whole.setdefault(identity, [])
            if history and history[-1][0] == self.sequence_length:
                history[-1][1] += windows
            elif windows:
                history.append([self.sequence_length, windows])
        return whole


class Places(NamedTuple):
    """Where windows lie, an entry each: source, and epoch, stream and number there."""

    source: Ints
    epoch: Ints
    stream: Ints
    number: Ints


class DataSchedule:
    """The windows of a run from `state` on, or from the beginning.

    Raises DataError where a source cannot give windows of this length, or its tokenizer is not
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
        """`position`: tokens consumed, where there is no state to say more."""
        if position < 0:
            raise DataError(f"the data position is {position}: expected 0 or more tokens")
        self.sources, self.sequence_length = list(sources), sequence_length
        self._identities = [source.index.identity for source in sources]
        mixture = [
            [identity, source.weight, source.repeat]
            for identity, source in zip(self._identities, sources, strict=True)
        ]
        fresh = DataState(sequence_length, mixture, position // sequence_length)
        tokenizer = self._one_tokenizer(state)
        if state is None:
            state = fresh
        known = {identity for identity, *_ in state.mixture} | state.before.keys()
        self.new_sources = [  # that the run had never seen, where it has a state
            source.name
            for source, identity in zip(sources, self._identities, strict=True)
            if identity not in known
        ]
        if (state.sequence_length, state.mixture) != (sequence_length, mixture):
            before = state.histories()
            state = DataState(sequence_length, mixture, before=before, skipped=state.skipped)
        self._state = replace(state, tokenizer=tokenizer)
        self.begin = state.windows  # the first window to serve
        histories = [state.before.get(identity, []) for identity in self._identities]
        self.orders = [
            window_order(source, sequence_length, seed, history)
            for source, history in zip(sources, histories, strict=True)
        ]
        # Windows of each order that were served before those of this mixture.
        self._done = [h[-1][1] if h and h[-1][0] == sequence_length else 0 for h in histories]
        limits = [
            None if source.repeat else max(0, order.first_pass - done)
            for source, order, done in zip(sources, self.orders, self._done, strict=True)
        ]
        self._mixture = Mixture([source.weight for source in sources], limits)

    def shares(self) -> dict[str, float]:
        """By source, the part of its training tokens that a whole epoch serves as labels."""
        return {
            source.name: order.windows_per_epoch
            * self.sequence_length
            / source.index.split("train").tokens
            for source, order in zip(self.sources, self.orders, strict=True)
        }

    @property
    def windows(self) -> int | None:
        """How many windows there are, counted as `begin` is; None: without end."""
        return self._mixture.windows

    def places(self, first: int, count: int) -> Places:
        """Where the windows first, first + 1, ... lie. Raises DataError past the last one."""
        sources, numbers = self._mixture.turns(first, count)
        if len(sources) < count:
            raise DataError(
                f"the data ends after {self.windows} windows of {self.sequence_length} tokens: all "
                "sources are retired; train fewer steps, or let one repeat (data.sources)"
            )
        parts = np.empty((3, count), np.int64)
        for source, (order, done) in enumerate(zip(self.orders, self._done, strict=True)):
            mine = np.flatnonzero(sources == source)
            if len(mine):
                parts[:, mine] = order.turns(done + int(numbers[mine[0]]), len(mine))
        return Places(sources, *parts)

    def shard_name(self, window: int) -> str:
        """Source and file of the shard that a window lies in."""
        source, *place = (int(part[0]) for part in self.places(window, 1))
        index = self.sources[source].index
        shard = index.split("train").shards[self.orders[source].block(*place).shard]
        return f"{self.sources[source].name}/{shard.file}"

    def window_of_run(self, window: int) -> int:
        """The number of a window among all of the run."""
        return self._state.windows_before + window

    def tokens(self, windows: int) -> int:
        """Tokens consumed by the run after `windows` windows, of all lengths."""
        before = self._state.before.values()
        earlier = sum(length * count for history in before for length, count in history)
        return earlier + windows * self.sequence_length

    def epochs(self, windows: int) -> dict[str, float]:
        """Passes over each source after `windows` windows."""
        counts = self._mixture.counts(windows)
        each = zip(self.sources, self.orders, self._done, counts, strict=True)
        return {source.name: order.epochs(done + count) for source, order, done, count in each}

    def state(self, windows: int, skipped: list[list[Any]]) -> DataState:
        """The state after `windows` windows."""
        counts = self._mixture.counts(windows)
        served = dict(zip(self._identities, counts, strict=True))
        return replace(self._state, windows=windows, served=served, skipped=skipped)

    def _one_tokenizer(self, state: DataState | None) -> dict[str, Any]:
        """The tokenizer of all sources and of the state."""
        whose, expected = "the checkpoint", state.tokenizer if state else {}
        for source in self.sources:
            found = source.index.tokenizer.model_dump()
            if expected and found != expected:
                raise DataError(
                    f"{source.index.location}: its tokenizer {_short(found)} is not that of "
                    f"{whose}, {_short(expected)}; prepare it again with that one"
                )
            whose, expected = self.sources[0].index.location, found
        return expected


def window_order(source: DataSource, length: int, seed: int, history: History) -> WindowOrder:
    """A source's order for windows of `length` tokens, after what was served before.

    If the history ends with the same length, the order begins where that does.
    """
    index, split = source.index, source.index.split("train")
    unit = index.document_tokens
    if unit and any(shard.tokens % unit for shard in split.shards):
        raise DataError(
            f"{index.location}: a shard does not end with a document of {unit} tokens; prepare the "
            "data again"
        )
    order: WindowOrder | None = None
    lengths = [cut[0] for cut in history] + [length]
    if len(lengths) > 1 and lengths[-2] == length:
        lengths.pop()
    for place, cut in enumerate(lengths):
        aligned = source.aligned(cut)
        if order is None:
            tokens = [shard.tokens for shard in split.shards]
            order = WindowOrder(tokens, sequence_length=cut, seed=seed, aligned=aligned)
        else:
            order = order.recut(history[place - 1][1], sequence_length=cut, aligned=aligned)
    assert order is not None
    return order


def _short(tokenizer: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in tokenizer.items())
