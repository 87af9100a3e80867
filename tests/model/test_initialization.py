"""Initial weights: drawn by the model itself, and the same in every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hg_scale.config.load import parse_config
from hg_scale.config.read import merge
from hg_scale.config.schema import ModelConfig
from hg_scale.model.hourglass import Hourglass, parameter_shapes
from tests.training.models import BY_LEVEL, PAPER, layout
from tests.world import Worlds


def small(**changes: Any) -> ModelConfig:
    sizes = {"hierarchy": "1@1 1@2 1@1", "d_model": 16, "heads": 2, "d_ff": 32, "vocab_size": 16}
    return ModelConfig(**{**sizes, **changes})


@pytest.mark.parametrize("initialization", ["paper", "scaled_normal"])
def test_outputs_of_a_new_model_depend_on_its_input(initialization: str) -> None:
    model = Hourglass(small(initialization=initialization))
    ids = torch.arange(12).remainder(7)[None]
    with torch.no_grad():
        assert (model(ids) - model(ids + 1)).abs().amax(-1).min() > 1e-3


def test_the_seed_determines_the_weights() -> None:
    first, again, other = (Hourglass(small(), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = [name for name in first if first[name].dim() == 2]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)


def test_a_model_on_the_meta_device_draws_nothing() -> None:
    with torch.device("meta"):
        model = Hourglass(small())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert parameter_shapes(small()) == {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
    }


def test_a_model_without_blocks_is_initialised() -> None:
    """Its resampling attention has residual branches all the same."""
    model = Hourglass(small(hierarchy="0@1 0@2 0@1", initialization="scaled_normal"))
    out = model.get_parameter("level0.shorten.attend.attention.out.weight")
    assert float(out.detach().std()) == pytest.approx((2 * out.shape[1]) ** -0.5, rel=0.2)


def test_fused_matrices_are_drawn_as_several() -> None:
    """Glorot's bound sqrt(6 / (fan-in + fan-out)) of one of the two or three matrices."""
    sizes = {"hierarchy": "1@1 1@2 1@1", "d_model": [64, 96], "heads": 2, "d_ff": 32}
    model = Hourglass(small(**sizes, pooling="attention", initialization="paper"))
    for name, fans in {
        "pre.0.attention.qkv.weight": 64 + 64,
        "level0.shorten.attend.attention.kv.weight": 64 + 96,
        "level0.shorten.attend.attention.out.weight": 96 + 96,
    }.items():
        largest = float(model.get_parameter(name).detach().abs().max())
        assert largest == pytest.approx((6 / fans) ** 0.5, rel=0.01), name


def count_equal_slices(tree: dict[str, Any]) -> int:
    """Compare every parameter of this rank's engine with the plain model's; return their number."""
    from hg_scale.model.sharding import shard_of
    from hg_scale.parallel.mesh import make_mesh
    from hg_scale.training.engine import make_engine

    config = parse_config(tree, world_size=torch.distributed.get_world_size())
    mesh, parts = make_mesh(config.parallel)
    engine = make_engine(config, mesh, parts, torch.device("cpu"))
    plain = Hourglass(config.model, seed=config.training.seed)
    for parameter, described in engine.slices.items():
        expected = shard_of(parameter).slice_of(plain.get_parameter(described.name))
        assert torch.equal(parameter, expected), described.name
    return len(engine.slices)


@pytest.mark.parametrize("tree", [PAPER, BY_LEVEL], ids=["paper", "by level"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 2)])
def test_an_engine_has_the_weights_of_the_plain_model(
    worlds: Worlds, tree: dict[str, Any], tensor: int, pipeline: int
) -> None:
    tree = merge(layout(tree, tensor, pipeline), {"training": {"seed": 5}})
    counts = worlds.run(tensor * pipeline, count_equal_slices, tree)
    names = len(parameter_shapes(parse_config(tree).model))
    assert sum(counts[::tensor]) >= names  # more with a copy of the position bias in each stage
