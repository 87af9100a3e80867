"""Incremental decoding: the prompt in one pass, then a token at a time, at every level in its time.

A level with total factor K takes a step once in K tokens. Nothing of the model's mathematics is
here: the layers take up the cache of their `Context` by themselves (`cache.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hg_scale.model.block import Activations
from hg_scale.model.cache import Cache
from hg_scale.model.context import Context, mix
from hg_scale.model.hourglass import Hourglass
from hg_scale.model.plan import layer_plan
from hg_scale.model.sampling import Sampling

BLOCK = 256  # random numbers that a row draws at once


class Decoder:
    """A model that goes on from what it has read, for `length` tokens a row in all."""

    def __init__(self, model: Hourglass, length: int) -> None:
        self.model, self.length = model, length
        self.cache = Cache(length)
        self._context = Context(model.config.parsed.factors)
        plan = layer_plan(model.config)
        ups = {layer.level: i for i, layer in enumerate(plan) if layer.kind == "upsample"}
        # Where a pass goes on that made no group whole: where the level is left.
        self._exits = {i: ups[p.level] for i, p in enumerate(plan) if p.kind == "shorten"}

    @property
    def position(self) -> int:
        """Tokens read, of the longest row."""
        return self.cache.position

    @torch.inference_mode()
    def prefill(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Read the prompts, ids (B, n) padded on the right: logits (B, vocabulary) of what follows.

        `lengths` (B,), of at least 1, differ by multiples of the model's total factor, and one is
        n. Anything read before is forgotten. Raises ValueError where lengths do not fit.
        """
        n = ids.shape[1]
        offsets = None if lengths is None or bool((lengths == n).all()) else n - lengths
        if offsets is not None:
            factor = self.model.config.parsed.total_factor
            if int(offsets.min()) or int(offsets.max()) >= n or bool((offsets % factor).any()):
                raise ValueError(f"lengths {lengths} of rows of {n} must differ by {factor}s")
        if not 0 < n <= self.length:
            raise ValueError(f"a prompt of {n} tokens, expected 1 to {self.length}")
        self.cache = Cache(self.length, offsets)
        self._context = Context(self.model.config.parsed.factors, cache=self.cache)
        *layers, head = self.model.sequence
        state = Activations(ids)
        for layer in layers:
            state = layer(state, self._context)
        state = head(Activations(self.cache.ends(state.x, 1)), self._context)
        self.cache.position = n
        return state.x[:, 0, : self.model.config.vocab_size]

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Read one more token a row, ids (B,): logits (B, vocabulary) of what follows."""
        if not 0 < self.position < self.length:
            raise ValueError(f"no room: {self.position} tokens of {self.length} are read")
        layers, context = self.model.sequence, self._context
        state, number = Activations(ids[:, None]), 0
        while number < len(layers):
            state = layers[number](state, context)
            number = number + 1 if state.x.shape[1] else self._exits[number]
        self.cache.position += 1
        return state.x[:, 0, : self.model.config.vocab_size]


@dataclass
class _Row:
    """One text: its prompt and what follows, of which the model sees the part from `begin` on."""

    ids: list[int]
    tokens: int  # how many of them there may be, the prompt included
    seed: int
    begin: int = 0
    unread: deque[int] = field(default_factory=deque)  # what of it a decoder is still to read
    done: bool = False

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self._numbers: list[float] = []

    @property
    def seen(self) -> int:
        return len(self.ids) - self.begin

    def uniform(self) -> float:
        """The next random number, in [0, 1); 0 where there is nothing to draw.

        A function of the seed and of how many were used before.
        """
        if self.unread or self.done:
            return 0.0
        if not self._numbers:
            self._numbers = torch.rand(BLOCK, generator=self._generator).tolist()[::-1]
        return self._numbers.pop()


def generate(
    model: Hourglass,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling,
    *,
    seed: int = 1,
    stop: int | None = None,
    context: int | None = None,
    first_row: int = 0,
    vocab_size: int | None = None,
) -> Iterator[tuple[int, int]]:
    """(row, token) as they are made: up to `tokens` a row, the last one `stop` if that comes up.

    A row depends on its prompt, on `seed` and on its number, counted from `first_row`, not on the
    rows beside it (up to rounding). Prompts have at least one token. The model sees up to `context`
    tokens (default: its sequence length); where they are full, it goes on from their last half. Ids
    from `vocab_size` on are not drawn.
    """
    limit = context or model.config.sequence_length
    if limit < 2 or not all(prompts):
        raise ValueError("expected a context of at least 2, and no empty prompt")
    numbered = enumerate(prompts, start=first_row)
    rows = [_Row(list(ids), len(ids) + tokens, mix(seed, n)) for n, ids in numbered]
    active = {number: row for number, row in enumerate(rows) if tokens > 0}
    while active:
        for row in active.values():
            if row.seen > limit:
                row.begin = len(row.ids) - limit // 2
        yield from _go_on(model, active, limit, sampling, stop, vocab_size)
        active = {number: row for number, row in active.items() if not row.done}


def _go_on(
    model: Hourglass,
    rows: dict[int, _Row],
    limit: int,
    sampling: Sampling,
    stop: int | None,
    vocab_size: int | None,
) -> Iterator[tuple[int, int]]:
    """Read the rows and add to them until all are done, or one is past the limit.

    Rows advance together, so a decoder has to meet them at one phase of the model's groups: that
    of the shortest. A row that is ahead of it reads its last few tokens one at a time, while the
    others read what they draw.
    """
    device, factor = next(model.parameters()).device, model.config.parsed.total_factor
    shortest = min(row.seen for row in rows.values())
    lengths = [row.seen - (row.seen - shortest) % factor for row in rows.values()]
    padded = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for line, row, n in zip(padded, rows.values(), lengths, strict=True):
        line[:n] = torch.tensor(row.ids[row.begin : row.begin + n])
        row.unread = deque(row.ids[row.begin + n :])
    longest = max(row.tokens - row.begin for row in rows.values())
    decoder = Decoder(model, min(longest, limit) + factor)
    logits = decoder.prefill(padded.to(device), torch.tensor(lengths, device=device))
    while True:
        uniform = torch.tensor([row.uniform() for row in rows.values()], device=device)
        following = sampling.choose(logits[:, :vocab_size], uniform).tolist()
        for i, (number, row) in enumerate(rows.items()):
            if row.unread:
                following[i] = row.unread.popleft()
            elif not row.done:
                row.ids.append(following[i])
                row.done = following[i] == stop or len(row.ids) == row.tokens
                yield number, following[i]
        going = [row for row in rows.values() if not row.done]
        full = decoder.position == decoder.length
        if full or not going or max(row.seen for row in going) > limit:
            return
        logits = decoder.step(torch.tensor(following, device=device))
