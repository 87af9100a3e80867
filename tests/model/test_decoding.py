"""Decoding with a cache equals the model on the complete text, at every step."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hg_scale.config.schema import ModelConfig
from hg_scale.model.costs import cache_bytes
from hg_scale.model.decoding import Decoder, generate
from hg_scale.model.hourglass import Hourglass
from hg_scale.model.sampling import Sampling
from tests.model.test_causality import POOLINGS, UPSAMPLINGS
from tests.model.test_costs import models

VOCAB = 16
GREEDY = Sampling(temperature=0)
PAIRS = list(product(POOLINGS, UPSAMPLINGS))
TWO, THREE = "1@1 1@2 1@6 1@2 1@1", "1@1 1@2 1@4 1@8 1@4 1@2 1@1"


def make(hierarchy: str, **changes: Any) -> Hourglass:
    """Make a small model in fp32 without zero or equal weights."""
    sizes = {"d_model": 16, "heads": 2, "d_ff": 16, "vocab_size": VOCAB, "sequence_length": 64}
    return randomise(ModelConfig(hierarchy=hierarchy, **{**sizes, **changes}))


def randomise(config: ModelConfig) -> Hourglass:
    model = Hourglass(config, seed=3)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def random_ids(*shape: int, vocab: int = VOCAB) -> Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(1))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def assert_exact(model: Hourglass, starts: range, length: int, batch_size: int = 2) -> None:
    """From every start, every step returns the logits of the complete text at that position."""
    vocab = model.config.vocab_size
    ids = random_ids(batch_size, length, vocab=vocab)
    with torch.inference_mode():
        expected = model(ids)[..., :vocab]
    for start in starts:
        decoder = Decoder(model, length)
        assert_close(decoder.prefill(ids[:, :start]), expected[:, start - 1])
        for t in range(start, length):
            assert_close(decoder.step(ids[:, t]), expected[:, t])


@pytest.mark.parametrize("positions", ["relative", "rotary"])
@pytest.mark.parametrize(("pooling", "upsampling"), PAIRS)
def test_every_pair_of_resampling_kinds(pooling: str, upsampling: str, positions: str) -> None:
    """One shortening, from every phase; the first prompt is shorter than a group."""
    model = make("1@1 1@3 1@1", pooling=pooling, upsampling=upsampling, positions=positions)
    assert_exact(model, range(1, 7), 10)


@pytest.mark.parametrize(("pooling", "upsampling"), PAIRS)
def test_two_and_three_shortenings(pooling: str, upsampling: str) -> None:
    """From every phase of the product of the factors."""
    for hierarchy, positions, phases in ((TWO, "rotary", 6), (THREE, "relative", 8)):
        model = make(hierarchy, pooling=pooling, upsampling=upsampling, positions=positions)
        assert_exact(model, range(1, phases + 1), phases + 5)


@pytest.mark.parametrize(
    ("hierarchy", "changes"),
    [
        ("2@1", {}),
        ("2@1", {"positions": "rotary"}),
        ("1@1 1@1 1@1", {}),  # k = 1
        ("2@1 1@3 0@1", {}),
        ("0@1 0@3 0@1", {}),
        (TWO, {"positions": ["relative", "rotary", "relative"]}),
        (TWO, {"shared_position_bias": True}),
        (THREE, {"d_model": [8, 12, 16, 24], "heads": [2, 3, 2, 4], "skip": "learned"}),
        ("1@1 1@3 1@1", {"norm": "rmsnorm", "activation": "swiglu", "qk_norm": True,
                         "positions": "rotary", "bias": False}),
    ],
)  # fmt: skip
def test_hierarchies(hierarchy: str, changes: dict[str, Any]) -> None:
    assert_exact(make(hierarchy, **changes), range(1, 8), 14)


@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_windows_use_a_ring_buffer(positions: str) -> None:
    """Windows shorter and longer than the prompt; the buffer wraps around several times."""
    model = make(TWO, window=[4, 3, 2], positions=positions)
    assert_exact(model, range(1, 15), 32)


@settings(max_examples=40)
@given(config=models(), start=st.integers(1, 20))
def test_any_model(config: ModelConfig, start: int) -> None:
    model = randomise(config)
    assert_exact(model, range(start, start + 1), 30)
    decoder = Decoder(model, 48)
    decoder.prefill(random_ids(3, start, vocab=config.vocab_size))
    assert decoder.cache.bytes == cache_bytes(config, 48, batch_size=3)


@pytest.mark.parametrize("window", [None, [5, 3, None]])
@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_prompts_of_different_lengths(positions: str, window: Any) -> None:
    """Padded prompts whose lengths differ by complete groups are decoded independently."""
    for hierarchy, k in ((TWO, 6), ("2@1", 1)):
        windows = window[:1] if window and k == 1 else window
        model = make(hierarchy, positions=positions, window=windows)
        for n in (2 * k + 1, 3 * k - 1, 3 * k):
            lengths = torch.tensor([n, n - k, n - 2 * k]).clamp(min=1)
            texts = [random_ids(length + 20) for length in lengths.tolist()]
            padded = torch.full((3, n), VOCAB - 1)
            for row, text, length in zip(padded, texts, lengths.tolist(), strict=True):
                row[:length] = text[:length]
            with torch.inference_mode():
                expected = [model(text[None])[0, :, :VOCAB] for text in texts]
            decoder = Decoder(model, n + 20)
            logits = decoder.prefill(padded, lengths)
            for step in range(20):
                last = [int(length) - 1 + step for length in lengths]
                rows = [e[i] for e, i in zip(expected, last, strict=True)]
                assert_close(logits, torch.stack(rows))
                following = torch.stack([t[i + 1] for t, i in zip(texts, last, strict=True)])
                logits = decoder.step(following)


def recompute(model: Hourglass, prompt: list[int], tokens: int) -> list[int]:
    """Generate greedily by running the model on the complete text for every token."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids]))[0, -1, :VOCAB].argmax()))
    return ids[len(prompt) :]


def texts_of(generated: Any, prompts: int) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in range(prompts)]
    for index, token in generated:
        texts[index].append(token)
    return texts


def test_greedy_text_equals_recomputation() -> None:
    """A batch of prompts in all phases, shorter and longer than a group."""
    model = make(TWO)
    prompts = [random_ids(n).tolist() for n in (1, 2, 3, 5, 8, 13, 21, 4)]
    generated = texts_of(generate(model, prompts, 25, GREEDY), len(prompts))
    assert generated == [recompute(model, prompt, 25) for prompt in prompts]


def test_a_continuation_does_not_depend_on_the_batch() -> None:
    model = make(TWO, positions="rotary")
    prompts = [random_ids(n).tolist() for n in (7, 1, 12, 12)]
    sampling = Sampling(0.9, top_k=12, top_p=0.95)
    batched = texts_of(generate(model, prompts, 100, sampling, context=40), 4)
    for i, prompt in enumerate(prompts):
        alone = generate(model, [prompt], 100, sampling, context=40, first_row=i)
        assert texts_of(alone, 1)[0] == batched[i]
    assert batched[2] != batched[3]  # equal prompts, different seeds


def test_a_full_context_continues_from_its_last_half() -> None:
    model = make(TWO)
    prompt = random_ids(5).tolist()
    generated = texts_of(generate(model, [prompt], 30, GREEDY, context=12), 1)[0]
    text, start = list(prompt), 0
    for token in generated:
        if len(text) - start > 12:
            start = len(text) - 6
        assert token == recompute(model, text[start:], 1)[0]
        text.append(token)


def test_a_continuation_ends_at_the_stop_token() -> None:
    model = make("1@1 1@2 1@1")
    prompts = [random_ids(n).tolist() for n in (3, 4)]
    free = texts_of(generate(model, prompts, 40, Sampling(), seed=4), 2)
    stop = free[0][7]
    generated = texts_of(generate(model, prompts, 40, Sampling(), seed=4, stop=stop), 2)
    for stopped, text in zip(generated, free, strict=True):
        assert stopped == (text[: text.index(stop) + 1] if stop in text else text)


def test_invalid_decoder_calls_raise() -> None:
    model = make(TWO)
    decoder = Decoder(model, 8)
    with pytest.raises(ValueError, match="cannot decode"):
        decoder.step(torch.tensor([1]))
    with pytest.raises(ValueError, match="expected 1 to 8"):
        decoder.prefill(random_ids(1, 9))
    with pytest.raises(ValueError, match="differ by 6s"):
        decoder.prefill(random_ids(2, 8), torch.tensor([8, 5]))
    decoder.prefill(random_ids(1, 8))
    with pytest.raises(ValueError, match="cannot decode"):
        decoder.step(torch.tensor([1]))
