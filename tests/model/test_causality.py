"""Causality and freshness: the positions that each output depends on, from the model's gradients.

The ids are already shifted: position t holds the token before the one it predicts, so output t may
depend on positions 0 .. t, and with full-length blocks it must depend on all of them.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from hg_scale.config.schema import ModelConfig
from hg_scale.model.grouping import FixedGroups
from hg_scale.model.hourglass import Hourglass

POOLINGS = ("average", "linear", "attention+average", "attention+linear")
UPSAMPLINGS = ("repeat", "linear", "attention+repeat", "attention+linear", "attention+none")
VOCAB = 16


def make(hierarchy: str, **changes: object) -> Hourglass:
    """Make a small model in float64 without zero or equal weights."""
    settings = {"d_model": 8, "heads": 2, "d_ff": 16, "vocab_size": VOCAB, "vocab_multiple": 1}
    config = ModelConfig(hierarchy=hierarchy, **{**settings, **changes})  # type: ignore[arg-type]
    model = Hourglass(config, seed=3)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double().eval()


def dependence(model: Hourglass, length: int) -> Tensor:
    """Return (length, length) bool: whether output t depends on the embedding of position s."""
    ids = torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(1))
    embedded: list[Tensor] = []

    def capture(_: object, __: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    handle = model.embedding.table.register_forward_hook(capture)
    logits = model(ids)[0]
    handle.remove()
    rows = []
    weights = torch.randn(logits.shape[1], dtype=logits.dtype)
    for t in range(length):
        (gradient,) = torch.autograd.grad(logits[t] @ weights, embedded[0], retain_graph=True)
        rows.append(gradient[0].abs().sum(-1) > 1e-12)
    return torch.stack(rows)


def assert_causal_and_fresh(model: Hourglass, length: int) -> None:
    expected = torch.ones(length, length, dtype=torch.bool).tril()
    seen = dependence(model, length)
    assert not (seen & ~expected).any(), "an output depends on a later position"
    assert (seen == expected).all(), "an output does not depend on an earlier position"


@pytest.mark.parametrize(("pooling", "upsampling"), list(product(POOLINGS, UPSAMPLINGS)))
def test_every_pair_of_resampling_kinds(pooling: str, upsampling: str) -> None:
    model = make("1@1 1@3 1@1", pooling=pooling, upsampling=upsampling)
    for length in (1, 2, 9, 11):
        assert_causal_and_fresh(model, length)


@pytest.mark.parametrize("positions", ["relative", "rotary"])
@pytest.mark.parametrize(("pooling", "upsampling"), list(product(POOLINGS, UPSAMPLINGS)))
def test_nested_levels_at_any_length(pooling: str, upsampling: str, positions: str) -> None:
    changes = {"pooling": pooling, "upsampling": upsampling, "positions": positions}
    model = make("1@1 1@2 1@6 1@2 1@1", **changes)
    for length in (6, 13):
        assert_causal_and_fresh(model, length)


def visible_through_groups(length: int, k: int) -> Tensor:
    """Return (length, length) bool: what output t sees if groups of k are its only source.

    That is its own position (the residual), and all positions up to the end of its group.
    Attention between levels sees groups that end there too, so it changes nothing.
    """
    t, s = torch.arange(length)[:, None], torch.arange(length)
    return (s == t) | (s <= t // k * k)


@pytest.mark.parametrize(("pooling", "upsampling"), list(product(POOLINGS, UPSAMPLINGS)))
def test_groups_are_fresh(pooling: str, upsampling: str) -> None:
    """Without full-length blocks a group is a position's only source, so staleness is visible."""
    model = make("0@1 1@3 0@1", pooling=pooling, upsampling=upsampling)
    for length in (1, 2, 9, 11):
        assert (dependence(model, length) == visible_through_groups(length, 3)).all()


@pytest.mark.parametrize("positions", ["relative", "rotary"])
@pytest.mark.parametrize(("pooling", "upsampling"), list(product(POOLINGS, UPSAMPLINGS)))
def test_nested_groups_are_fresh(pooling: str, upsampling: str, positions: str) -> None:
    """Position j of level 1 pools two tokens, and sees the groups of level 2 up to its own."""
    changes = {"pooling": pooling, "upsampling": upsampling, "positions": positions}
    model = make("0@1 0@2 1@6 0@2 0@1", **changes)
    for length in (6, 13):
        inner = visible_through_groups(-(-length // 2), 3)
        t, s = torch.arange(length)[:, None], torch.arange(length)
        holds = (s + 1) // 2 == torch.arange(len(inner))[:, None]  # j: tokens 2j - 1 and 2j
        if "attention" in pooling:  # and attention has seen all tokens before them
            holds = holds.cumsum(0) > 0
        seen = inner.double() @ holds.double() > 0
        if "attention" in upsampling:  # a token sees all positions up to its own
            seen = seen.cumsum(0) > 0
        assert (dependence(model, length) == ((s == t) | seen[s // 2])).all()


@pytest.mark.parametrize(
    ("hierarchy", "changes"),
    [
        ("2@1", {}),
        ("2@1", {"positions": "rotary"}),
        ("1@1 1@1 1@1", {}),  # k = 1
        ("1@1 1@2 1@2 1@4 1@2 1@2 1@1", {"pooling": "average", "upsampling": "repeat"}),
        ("1@1 1@2 1@4 1@8 1@4 1@2 1@1", {}),
        ("2@1 1@3 0@1", {}),
        ("0@1 1@3 2@1", {}),
        ("1@1 0@3 1@1", {}),
        ("1@1 1@3 1@1", {"d_model": [8, 12], "heads": [2, 3], "skip": "learned"}),
        ("1@1 1@3 1@1", {"norm": "rmsnorm", "activation": "swiglu", "qk_norm": True}),
    ],
)
def test_hierarchies(hierarchy: str, changes: dict[str, object]) -> None:
    model = make(hierarchy, **changes)
    for length in (7, 12):
        assert_causal_and_fresh(model, length)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_without_full_length_blocks_a_token_sees_itself_and_its_groups(k: int) -> None:
    """Paper, appendix A.1: output t sees position t (the residual) and the groups up to its own."""
    model = make(f"0@1 1@{k} 0@1", pooling="average", upsampling="repeat")
    length = 3 * k + 1
    t, s = torch.arange(length)[:, None], torch.arange(length)
    assert (dependence(model, length) == ((s == t) | (s <= t // k * k))).all()


@pytest.mark.parametrize(("error", "message"), [(-1, "later position"), (1, "earlier position")])
def test_a_wrong_shift_is_detected(
    monkeypatch: pytest.MonkeyPatch, error: int, message: str
) -> None:
    """k-2 leaks; k is stale, which is visible if the group is a position's only source."""

    def shift(self: FixedGroups, x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (0, 0, self.k - 1 + error, self.k))
        return padded[:, : self.count * self.k]

    monkeypatch.setattr(FixedGroups, "shift", shift)
    if error < 0:
        with pytest.raises(AssertionError, match=message):
            assert_causal_and_fresh(make("1@1 1@3 1@1"), 9)
    else:
        model = make("0@1 1@3 0@1", pooling="average", upsampling="repeat")
        t, s = torch.arange(9)[:, None], torch.arange(9)
        seen = dependence(model, 9)
        assert not (seen & (s > t)).any()
        assert (seen != ((s == t) | (s <= t // 3 * 3))).any()


@pytest.mark.parametrize("positions", ["rotary", "relative"])
@pytest.mark.parametrize("length", [4, 10, 12, 13])
def test_a_window_equals_masked_full_attention(positions: str, length: int) -> None:
    """Block-local products equal full attention; an output sees w - 1 positions back exactly."""
    w = 4
    windowed = make("1@1", positions=positions, window=w)
    t, s = torch.arange(length)[:, None], torch.arange(length)
    assert (dependence(windowed, length) == ((s <= t) & (s > t - w))).all()
    full = make("1@1", positions=positions)
    full.load_state_dict(windowed.state_dict())
    ids = torch.randint(0, VOCAB, (2, length))
    with torch.no_grad():
        logits = windowed(ids)
        for end in range(1, length + 1):  # the last position of a window sees all of it
            expected = full(ids[:, max(0, end - w) : end])[:, -1]
            torch.testing.assert_close(logits[:, end - 1], expected, rtol=0, atol=1e-10)


def test_appending_does_not_change_earlier_outputs() -> None:
    model = make("1@1 1@2 2@6 1@2 1@1")
    ids = torch.randint(0, VOCAB, (2, 23))
    with torch.no_grad():
        logits = model(ids)
        for length in range(1, 23):
            prefix = model(ids[:, :length])
            torch.testing.assert_close(prefix, logits[:, :length], rtol=0, atol=1e-9)
