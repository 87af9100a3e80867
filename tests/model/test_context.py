"""Stateless dropout, shorten-factor draws, and the loss of a padded vocabulary."""

from __future__ import annotations

import pytest
import torch

from hg_scale.config.schema import ModelConfig
from hg_scale.model.context import Context, Dropout, draw_factors, mix
from hg_scale.model.hourglass import Hourglass


def small(**changes: object) -> ModelConfig:
    sizes = {"hierarchy": "1@1 1@2 1@1", "d_model": 16, "heads": 2, "d_ff": 32, "vocab_size": 16}
    return ModelConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def test_dropout_mask_depends_on_seed_step_sample_and_site() -> None:
    layer = Dropout(0.25)
    x = torch.ones(4, 50, 40)
    full = layer(x, Context((), (1, 5), 8))
    assert full.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (full == 0).float().mean() == pytest.approx(0.25, abs=0.02)
    halves = [layer(x[:2], Context((), (1, 5), 8)), layer(x[2:], Context((), (1, 5), 10))]
    assert torch.equal(torch.cat(halves), full)
    for other in (Context((), (2, 5), 8), Context((), (1, 6), 8), Context((), (1, 5), 9)):
        assert not torch.equal(layer(x, other), full)
    layer.site = 1
    assert not torch.equal(layer(x, Context((), (1, 5), 8)), full)
    assert torch.equal(layer(x, Context(())), x)  # evaluation


def test_every_dropout_of_a_model_has_masks_of_its_own() -> None:
    model = Hourglass(ModelConfig(hierarchy="2@1 2@2 2@1", d_model=16, heads=2, d_ff=32))
    sites = [module.site for module in model.modules() if isinstance(module, Dropout)]
    assert len(sites) == len(set(sites)) and len(sites) > 6 * 4


def test_tensor_ranks_have_slices_of_one_dropout_mask() -> None:
    x = torch.ones(2, 6, 8)
    context = Context((), (1, 1))
    full = Dropout(0.5)(x, context)
    for dim in (1, -1):
        slices = [Dropout(0.5, dim, rank, 2)(x.chunk(2, dim)[rank], context) for rank in (0, 1)]
        assert torch.equal(torch.cat(slices, dim), full)


def test_recomputed_blocks_have_the_same_gradients() -> None:
    config = small(dropout=0.2)
    ids = torch.randint(0, 16, (2, 13))
    gradients = []
    for recompute in (None, [True, True]):
        model = Hourglass(config, recompute=recompute)
        model(ids, ids, Context((2,), (1, 1))).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_drawn_factors_depend_on_seed_and_step() -> None:
    choices = [[2, 3], [1, 2, 4]]
    drawn = [draw_factors(choices, 1, step) for step in range(400)]
    assert drawn == [draw_factors(choices, 1, step) for step in range(400)]
    assert {f for f, _ in drawn} == {2, 3} and {f for _, f in drawn} == {1, 2, 4}
    assert sum(f == 2 for f, _ in drawn) == pytest.approx(200, abs=40)
    assert drawn != [draw_factors(choices, 2, step) for step in range(400)]


def test_model_with_a_drawn_factor_equals_the_model_of_that_hierarchy() -> None:
    two, three = small(), small(hierarchy="1@1 1@3 1@1")
    model, other = Hourglass(two), Hourglass(three, seed=None)
    other.load_state_dict(model.state_dict())
    ids = torch.randint(0, 16, (2, 17))
    assert torch.equal(model(ids, context=Context((3,))), other(ids))
    assert not torch.equal(model(ids), other(ids))


def test_mix_has_no_collisions() -> None:
    seeds = {mix(a, b) for a in range(40) for b in range(40)}
    assert len(seeds) == 1600
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_padded_logits_do_not_change_the_loss() -> None:
    padded, exact = small(vocab_size=13), small(vocab_size=13, vocab_multiple=1)
    model, plain = Hourglass(padded), Hourglass(exact, seed=None)
    weights = {
        name: value[: plain.get_parameter(name).shape[0]]
        for name, value in model.state_dict().items()
    }
    plain.load_state_dict(weights)
    ids = torch.randint(0, 13, (2, 9))
    labels = torch.randint(0, 13, (2, 9))
    labels[0, 3] = -1
    assert float(model(ids, labels)) == pytest.approx(float(plain(ids, labels)), rel=1e-6)
    by_hand = torch.nn.functional.cross_entropy(
        plain(ids).flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="sum"
    )
    assert float(plain(ids, labels)) == pytest.approx(float(by_hand) / 18, rel=1e-6)
