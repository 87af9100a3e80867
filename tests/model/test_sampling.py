"""Sampling against the definitions of temperature, top-k and top-p."""

from __future__ import annotations

import pytest
import torch

from hg_scale.model.sampling import Sampling

LOGITS = torch.tensor([0.5, 0.05, 0.2, 0.25]).log()[None]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.5, 0.05, 0.2, 0.25]),
        (Sampling(0.5), [0.7042, 0.0070, 0.1127, 0.1761]),
        (Sampling(top_k=2), [2 / 3, 0, 0, 1 / 3]),
        (Sampling(top_k=9), [0.5, 0.05, 0.2, 0.25]),
        (Sampling(top_p=0.5), [1, 0, 0, 0]),
        (Sampling(top_p=0.51), [2 / 3, 0, 0, 1 / 3]),
        (Sampling(top_p=0.9), [0.5263, 0, 0.2105, 0.2632]),
        (Sampling(top_k=3, top_p=0.7), [2 / 3, 0, 0, 1 / 3]),
    ],
)
def test_probabilities(sampling: Sampling, expected: list[float]) -> None:
    probabilities = sampling.probabilities(LOGITS)[0]
    assert (probabilities / probabilities.sum()).tolist() == pytest.approx(expected, abs=1e-4)


def test_the_uniform_number_selects_the_token() -> None:
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.56, 0.74, 0.76, 1 - 2**-24])
    chosen = Sampling().choose(LOGITS.expand(7, -1), uniform)
    assert chosen.tolist() == [0, 0, 1, 2, 2, 3, 3]
    last = Sampling(top_k=1).choose(LOGITS, torch.tensor([1 - 2**-24]))
    assert last.tolist() == [0]  # never a token of probability 0, even at the end


def test_greedy_selects_the_most_likely_token() -> None:
    assert Sampling(0).choose(LOGITS, torch.tensor([0.9])).tolist() == [0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-310, 5e-324])
def test_tiny_temperatures_do_not_overflow(temperature: float) -> None:
    probabilities = Sampling(temperature).probabilities(torch.tensor([[3.0, 1.0, 3.0, -2.0]]))
    assert probabilities.tolist() == [[0.5, 0, 0.5, 0]]


def test_frequencies_match_the_probabilities() -> None:
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(1))
    chosen = Sampling().choose(LOGITS.expand(20_000, -1), uniform)
    shares = torch.bincount(chosen, minlength=4) / 20_000
    assert shares.tolist() == pytest.approx([0.5, 0.05, 0.2, 0.25], abs=0.01)
