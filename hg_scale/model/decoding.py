"""Incremental decoding with a cache: the prompts in one pass, then one token per sequence and step.

A level with total factor K runs once in K tokens. The model's mathematics is not repeated here: the
layers use the cache of their `Context` (`cache.py`).
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

RANDOM_BLOCK = 256  # random numbers that a sequence draws at once


class Decoder:
    """A model with a cache for up to `length` tokens per sequence."""

    def __init__(self, model: Hourglass, length: int) -> None:
        self.model, self.length = model, length
        self.cache = Cache(length)
        self._context = Context(model.config.parsed.factors)
        plan = layer_plan(model.config)
        upsamples = {layer.level: i for i, layer in enumerate(plan) if layer.kind == "upsample"}
        # The layer that follows a shortening which completed no group: its upsampling.
        self._exits = {i: upsamples[p.level] for i, p in enumerate(plan) if p.kind == "shorten"}

    @property
    def position(self) -> int:
        """Number of tokens in the cache, of the longest sequence."""
        return self.cache.position

    @torch.inference_mode()
    def prefill(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Process the prompts, ids (B, n) padded on the right, with an empty cache.

        `lengths` (B,): of the prompts, at least 1; one of them is n, and they differ by multiples
        of the model's total factor. Returns the logits (B, vocabulary) of the next tokens. Raises
        ValueError if the lengths do not fit.
        """
        n = ids.shape[1]
        offsets = None if lengths is None or bool((lengths == n).all()) else n - lengths
        if offsets is not None:
            factor = self.model.config.parsed.total_factor
            if int(offsets.min()) or int(offsets.max()) >= n or bool((offsets % factor).any()):
                raise ValueError(f"lengths {lengths} of {n} padded ids must differ by {factor}s")
        if not 0 < n <= self.length:
            raise ValueError(f"a prompt of {n} tokens, expected 1 to {self.length}")
        self.cache = Cache(self.length, offsets)
        self._context = Context(self.model.config.parsed.factors, cache=self.cache)
        *layers, head = self.model.sequence
        state = Activations(ids)
        for layer in layers:
            state = layer(state, self._context)
        state = head(Activations(self.cache.last_positions(state.x, 1)), self._context)
        self.cache.position = n
        return state.x[:, 0, : self.model.config.vocab_size]

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Process one more token per sequence, ids (B,).

        Returns the logits (B, vocabulary) of the next tokens. Raises ValueError before `prefill`,
        and if the cache is full.
        """
        if not 0 < self.position < self.length:
            raise ValueError(
                f"cannot decode token {self.position} of {self.length}: call prefill first, and "
                "make a decoder for all tokens"
            )
        layers, context = self.model.sequence, self._context
        state, number = Activations(ids[:, None]), 0
        while number < len(layers):
            state = layers[number](state, context)
            number = number + 1 if state.x.shape[1] else self._exits[number]
        self.cache.position += 1
        return state.x[:, 0, : self.model.config.vocab_size]


@dataclass
class _Sequence:
    """A prompt and its continuation, of which the model sees the tokens from `start` on."""

    ids: list[int]
    max_tokens: int  # including the prompt
    seed: int
    start: int = 0
    unread: deque[int] = field(default_factory=deque)  # tokens of the prompt not yet in the cache
    done: bool = False

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        self._numbers: list[float] = []

    @property
    def seen(self) -> int:
        """Number of tokens that the model sees."""
        return len(self.ids) - self.start

    def uniform(self) -> float:
        """Return the next random number, in [0, 1); 0 if there is no token to sample.

        It depends on the seed and on how many numbers were used before.
        """
        if self.unread or self.done:
            return 0.0
        if not self._numbers:
            self._numbers = torch.rand(RANDOM_BLOCK, generator=self._generator).tolist()[::-1]
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
    """Yield (index of the prompt, token) as they are generated: up to `tokens` per prompt.

    A continuation ends early with the token `stop`. It depends on its prompt, on `seed` and on its
    index, counted from `first_row`, but not on the other prompts (up to rounding). Prompts have at
    least one token. The model sees up to `context` tokens (default: its sequence length); when
    they are exceeded, it continues from the last half of them. Ids from `vocab_size` on are never
    sampled.
    """
    limit = context or model.config.sequence_length
    if limit < 2 or not all(prompts):
        raise ValueError("expected a context of at least 2, and no empty prompt")
    indexed = enumerate(prompts, start=first_row)
    sequences = [_Sequence(list(ids), len(ids) + tokens, mix(seed, i)) for i, ids in indexed]
    active = {i: sequence for i, sequence in enumerate(sequences) if tokens > 0}
    while active:
        for sequence in active.values():
            if sequence.seen > limit:
                sequence.start = len(sequence.ids) - limit // 2
        yield from _decode_batch(model, active, limit, sampling, stop, vocab_size)
        active = {i: sequence for i, sequence in active.items() if not sequence.done}


def _decode_batch(
    model: Hourglass,
    sequences: dict[int, _Sequence],
    limit: int,
    sampling: Sampling,
    stop: int | None,
    vocab_size: int | None,
) -> Iterator[tuple[int, int]]:
    """Prefill the sequences and continue them until all are done, or one exceeds the limit.

    Sequences advance together and need the same phase of the model's groups: that of the shortest
    one. A longer one is prefilled up to that phase, and its last few tokens follow one at a time
    while the others already sample.
    """
    device, factor = next(model.parameters()).device, model.config.parsed.total_factor
    shortest = min(sequence.seen for sequence in sequences.values())
    lengths = [s.seen - (s.seen - shortest) % factor for s in sequences.values()]
    padded = torch.zeros(len(sequences), max(lengths), dtype=torch.long)
    for row, sequence, n in zip(padded, sequences.values(), lengths, strict=True):
        row[:n] = torch.tensor(sequence.ids[sequence.start : sequence.start + n])
        sequence.unread = deque(sequence.ids[sequence.start + n :])
    longest = max(sequence.max_tokens - sequence.start for sequence in sequences.values())
    decoder = Decoder(model, min(longest, limit) + factor)
    logits = decoder.prefill(padded.to(device), torch.tensor(lengths, device=device))
    while True:
        uniform = torch.tensor([s.uniform() for s in sequences.values()], device=device)
        following = sampling.choose(logits[:, :vocab_size], uniform).tolist()
        for row_number, (i, sequence) in enumerate(sequences.items()):
            if sequence.unread:
                following[row_number] = sequence.unread.popleft()
            elif not sequence.done:
                token = following[row_number]
                sequence.ids.append(token)
                sequence.done = token == stop or len(sequence.ids) == sequence.max_tokens
                yield i, token
        active = [sequence for sequence in sequences.values() if not sequence.done]
        full = decoder.position == decoder.length
        if full or not active or max(sequence.seen for sequence in active) > limit:
            return
        logits = decoder.step(torch.tensor(following, device=device))
