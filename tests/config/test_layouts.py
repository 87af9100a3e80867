"""Layouts for fewer processes than configured."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hg_scale.config import ConfigError, load_config
from hg_scale.config.arithmetic import divisors
from hg_scale.config.checks import cross_checks
from hg_scale.config.layouts import (
    elastic_line,
    fitting_layouts,
    largest_fitting,
    load_elastic,
)
from tests.shared import ROOT


def test_seven_of_eight_nodes_keep_the_global_batch() -> None:
    """56 GPUs: 7 does not divide a batch of 256 but may be the pipeline size; or 32 GPUs run it."""
    config = load_config(ROOT / "configs" / "hg_1b.json", world_size=64)
    layouts = fitting_layouts(config, 56)
    assert [(x.tensor, x.pipeline, x.data) for x in layouts[:2]] == [(1, 7, 8), (1, 14, 4)]
    smaller = largest_fitting(config, 56)
    assert smaller and (smaller.tensor, smaller.pipeline, smaller.data) == (1, 1, 32)
    assert fitting_layouts(config, 64)[0].data == 64


@given(st.integers(1, 48), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
def test_every_returned_layout_passes_the_checks(world: int, tensor: int, pipeline: int) -> None:
    sets = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    sets += ["training.micro_batch_size=4", "training.global_batch_size=96"]
    config = load_config(ROOT / "configs" / "quickstart.json", sets)
    for layout in fitting_layouts(config, world):
        changed = layout.apply(config)
        assert layout.world_size == world and cross_checks(changed, world) == []
        assert changed.training.global_batch_size == 96
        assert layout.micro_batch_size <= 4 and 96 % (layout.micro_batch_size * layout.data) == 0
        again = load_config(
            ROOT / "configs" / "quickstart.json",
            [*sets, *layout.options().replace("--set ", "").split()],
            world_size=world,
        )
        assert again == changed
    smaller = largest_fitting(config, world)
    assert (smaller is None) == (world < tensor * pipeline)


ELASTIC = ["parallel.elastic=true", "parallel.tensor=2", "parallel.pipeline=2"]
QUICKSTART = ROOT / "configs" / "quickstart.json"


@pytest.mark.parametrize(
    ("world", "of_all", "of_fewer"),
    [(8, None, None), (12, None, None), (6, (2, 3, 1), (2, 3, 1)), (7, "none", (2, 2, 1)),
     (10, (1, 5, 2), (1, 5, 2)), (22, (2, 1, 11), (2, 2, 4)), (1, (1, 1, 1), (1, 1, 1))],
)  # fmt: skip
def test_elastic_configuration_uses_the_nearest_layout(
    world: int, of_all: object, of_fewer: object
) -> None:
    sets = [*ELASTIC, "training.global_batch_size=12", "training.micro_batch_size=1"]
    sets += ["training.global_batch_size=44"] if world == 22 else []
    for fewer, expected in ((False, of_all), (True, of_fewer)):
        if expected == "none":
            with pytest.raises(ConfigError):
                load_elastic(QUICKSTART, sets, world, fewer=fewer)
            continue
        config, layout = load_elastic(QUICKSTART, sets, world, fewer=fewer)
        found = layout and (layout.tensor, layout.pipeline, layout.data)
        assert found == expected
        if layout:
            started = layout.world_size
            again, _ = load_elastic(QUICKSTART, sets, started)  # what each rank does
            assert again == config
            assert elastic_line(config, layout, world).startswith(
                f"parallel.elastic: continuing with {started} of {world} processes: --set parallel."
            )


def test_other_errors_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model.heads"):
        load_elastic(QUICKSTART, [*ELASTIC, "model.heads=3"], 7, fewer=True)
    with pytest.raises(ConfigError, match="parallel.tensor|processes"):
        load_elastic(QUICKSTART, ELASTIC[1:], 6, fewer=True)


@given(st.integers(1, 500))
def test_divisors(number: int) -> None:
    found = divisors(number)
    assert found == sorted(set(found)) and all(number % n == 0 for n in found)
    assert found[0] == 1 and found[-1] == number
