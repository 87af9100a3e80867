"""What crosses a stage boundary with several open skips, packed into one tensor."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from hg_scale.config.load import parse_config
from hg_scale.model.block import Activations
from hg_scale.model.plan import boundary_shapes, layer_plan
from hg_scale.parallel.pipeline import pack, unpack
from hg_scale.parallel.pipeline_cut import PipelineCut
from tests.training.models import BY_LEVEL, layout, run_layout
from tests.world import Worlds

STEPS = 6
# Three levels of one width: a skip taken for another one fits wherever their lengths are equal.
ONE_WIDTH = {"d_model": 48, "heads": 4, "d_ff": 96, "window": None}


def with_open_skips(tree: dict[str, Any], count: int) -> list[int]:
    """Layers before which `count` skips are open."""
    model = parse_config(tree).model
    plan = layer_plan(model)
    shapes = [
        boundary_shapes(model, plan, i, model.sequence_length, model.parsed.factors)
        for i in range(len(plan))
    ]
    return [i for i, found in enumerate(shapes) if len(found) == count + 1]


def test_packing_keeps_the_order_of_the_skips() -> None:
    shapes = [(4, 6), (12, 2), (6, 4), (3, 8)]  # all of 24 elements
    tensors = [torch.full((2, *shape), float(i)) for i, shape in enumerate(shapes)]
    x, *skips = tensors
    packed = pack(Activations(x, tuple(skips)))
    assert packed.shape == (2, 4 * 24)
    assert packed[0].tolist() == [float(i) for i in range(4) for _ in range(24)]
    state = unpack(packed, shapes)
    for found, expected in zip((state.x, *state.skips), tensors, strict=True):
        assert torch.equal(found, expected)


def run_with_cut(tree: dict[str, Any], parts: tuple[int, ...]) -> dict[str, list[float]]:
    """Train with a pipeline that is cut at these layers."""
    zeros = (0,) * (len(parts) - 1)
    cut = PipelineCut(parts, zeros, zeros, tuple(map(float, zeros)))
    with mock.patch("hg_scale.training.engine.cut_pipeline", lambda *_: cut):
        return run_layout(tree, STEPS)


@pytest.mark.parametrize("widths", [{}, ONE_WIDTH], ids=["by_level", "one_width"])
@pytest.mark.parametrize("skips", [1, 2])
def test_same_curve_where_skips_are_open_at_the_boundary(
    worlds: Worlds, widths: dict[str, Any], skips: int
) -> None:
    """At the first and at the last layer that has so many open."""
    alone = worlds.run(1, run_layout, layout(BY_LEVEL, **widths), STEPS)[0]
    tree = layout(BY_LEVEL, pipeline=2, **widths)
    places = with_open_skips(layout(BY_LEVEL, **widths), skips)
    layers = len(layer_plan(parse_config(layout(BY_LEVEL, **widths)).model))
    for place in (places[0], places[-1]):
        curve = worlds.run(2, run_with_cut, tree, (0, place, layers))[0]
        for key in ("loss", "grad_norm", "validation"):
            np.testing.assert_allclose(curve[key], alone[key], rtol=1e-4, err_msg=key)
