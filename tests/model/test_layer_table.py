"""The table of `--dry-run`: its sharding, cache and costs are those of the modules."""

from __future__ import annotations

from typing import Any

import pytest

from hg_scale.config.load import parse_config
from hg_scale.config.read import merge
from hg_scale.model.costs import cache_bytes, parameter_count
from hg_scale.model.layer_table import layer_table
from tests.training.models import BY_LEVEL, PAPER
from tests.world import Worlds

LINEAR = merge(PAPER, {"model": {"pooling": "linear", "upsampling": "attention+none"}})
EQUAL = merge(PAPER, {"model": {"pooling": "average", "upsampling": "repeat"}})
TREES = {"paper": PAPER, "by level": BY_LEVEL, "linear": LINEAR, "without weights": EQUAL}


def sharded_layers(trees: list[dict[str, Any]]) -> list[dict[str, bool]]:
    """Return for each model, by layer, whether any of its parameters is sharded."""
    from hg_scale.model.hourglass import Hourglass
    from hg_scale.model.plan import layer_plan
    from hg_scale.model.sharding import shard_of
    from hg_scale.parallel import megatron

    megatron.initialize_groups(2, 1)
    found = []
    for tree in trees:
        model = parse_config(tree).model
        layers = zip(
            layer_plan(model),
            Hourglass(model, megatron.MegatronLayers(), seed=None).sequence,
            strict=True,
        )
        found.append({
            plan.name: any(
                shard_of(p).dim is not None
                for name, p in layer.named_parameters()
                if "position_bias" not in name
            )
            for plan, layer in layers
        })  # fmt: skip
    return found


def test_table_names_the_sharded_layers(worlds: Worlds) -> None:
    for tree, found in zip(
        TREES.values(), worlds.run(2, sharded_layers, list(TREES.values()))[0], strict=True
    ):
        rows = layer_table(parse_config(tree).model)
        split = {row.name.partition(" ..")[0]: bool(row.split) for row in rows}
        assert {name: found[name] for name in split} == split


@pytest.mark.parametrize("name", TREES)
def test_rows_sum_to_the_totals(name: str) -> None:
    model = parse_config(TREES[name]).model
    rows = layer_table(model)
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert sum(row.cache for row in rows) == cache_bytes(
        model, model.sequence_length, element_bytes=1
    )
    biases = 2 * model.by_level("d_model")[0] * model.shared_position_bias
    assert sum(row.parameters for row in rows) + biases == parameter_count(model)
