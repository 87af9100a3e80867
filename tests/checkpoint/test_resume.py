"""Save in one layout and resume in any other: the curve is that of the uninterrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hg_scale.checkpoint.fragments import KINDS
from hg_scale.checkpoint.load import CheckpointReader
from hg_scale.config.read import merge
from tests.convert.verified import verify
from tests.training.resumable import Layout, Run, parse
from tests.world import Worlds

BEFORE, AFTER = 2, 2  # steps before and after the save
BOUND = {"fp32": 1e-4, "bf16": 1e-2}  # relative


SAME = [
    *("1 1 1 zero0", "1 2 1 zero0", "1 1 2 zero1", "1 1 2 zero2", "2 1 2 zero3", "2 2 2"),
    *("1 1 2 zero3 bf16", "2 1 2 bf16", "2 1 2 zero2 bf16", "2 2 2 bf16"),
    "2 1 2 zero3 by_level",
]
"""Each of DeepSpeed's optimizers, with and without tensor and pipeline parallelism."""
PAIRS = [
    *(("2 2 2", reader) for reader in ("1 1 1 zero0", "1 1 2 zero2", "2 1 2 zero3", "1 2 2")),
    *((writer, "2 1 1") for writer in ("1 2 1 zero0", "1 1 2 zero2")),
    ("2 1 2 zero3", "2 2 2"),
    ("2 2 2 bf16", "2 1 2 zero3 bf16"),
    ("1 1 2 zero3 bf16", "1 2 1 bf16"),
    ("2 1 2 zero3 by_level", "2 2 1 by_level"),
]
"""(writer, reader): each optimizer on both sides, across tensor, pipeline and data sizes."""


def uninterrupted(tree: dict[str, Any], folder: Path) -> tuple[Path, list[tuple[float, float]]]:
    """Train, save, and continue training."""
    run = Run(tree)
    run.train(1, BEFORE)
    path = run.save(folder, BEFORE)
    return path, run.train(BEFORE + 1, AFTER)


def resumed(
    tree: dict[str, Any], path: Path, folder: Path
) -> tuple[Path, list[tuple[float, float]]]:
    """Load in this layout, save what was loaded at once, and continue training."""
    from hg_scale.training.state import load_state

    run = Run(tree)
    progress = load_state(run.engine, path)
    assert (progress.step, progress.position) == (BEFORE, 17)
    again = run.save(folder, BEFORE)
    return again, run.train(BEFORE + 1, AFTER)


@pytest.fixture(scope="module")
def source(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a checkpoint of a layout and the curve after it, made once per layout."""
    cache: dict[Layout, Any] = {}

    def get(layout: Layout) -> tuple[Path, list[tuple[float, float]]]:
        if layout not in cache:
            folder = tmp_path_factory.mktemp("source")
            cache[layout] = worlds.run(layout.world, uninterrupted, layout.tree(), folder)[0]
        return cache[layout]

    return get


def assert_same_contents(a: Path, b: Path) -> None:
    """Compare weights, moments and step counts bit for bit, whichever layouts wrote them."""
    first, second = CheckpointReader(a), CheckpointReader(b)
    assert first.shapes == second.shapes
    assert first.manifest["optimizer_step"] == second.manifest["optimizer_step"] == BEFORE
    for name in first.shapes:
        for kind in KINDS:
            x, y = first.full_tensor(name, kind), second.full_tensor(name, kind)
            assert torch.equal(x, y), (name, kind)


@pytest.mark.parametrize("name", SAME)
def test_resume_in_the_same_layout_is_bit_equal(
    worlds: Worlds, source: Any, tmp_path: Path, name: str
) -> None:
    layout = parse(name)
    path, curve = source(layout)
    verify(path)
    again, continued = worlds.run(layout.world, resumed, layout.tree(), path, tmp_path)[0]
    assert continued == curve
    assert_same_contents(path, again)


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_resume_in_another_layout(
    worlds: Worlds, source: Any, tmp_path: Path, writer: str, reader: str
) -> None:
    path, curve = source(parse(writer))
    layout = parse(reader)
    again, continued = worlds.run(layout.world, resumed, layout.tree(), path, tmp_path)[0]
    assert_same_contents(path, again)
    np.testing.assert_allclose(continued, curve, rtol=BOUND[layout.precision])


SIZES = {
    "reduce_bucket_size": 1000,
    "allgather_bucket_size": 1000,
    "sub_group_size": 3000,
    "stage3_max_live_parameters": 5000,
    "stage3_max_reuse_distance": 100,
    "stage3_model_persistence_threshold": 2000,
    "stage3_param_persistence_threshold": 100,
    "stage3_prefetch_bucket_size": 500,
}
OVERLAPPING: dict[str, Any] = {"zero_optimization": SIZES | {"overlap_comm": True}}
WITHOUT_OVERLAP: dict[str, Any] = {
    "zero_optimization": SIZES
    | {
        "contiguous_gradients": False,
        "reduce_scatter": False,
        "allgather_partitions": False,
        "stage3_use_all_reduce_for_fetch_params": True,
    },
    "communication_data_type": "fp32",
    "prescale_gradients": True,
    "gradient_predivide_factor": 2.0,
    "bf16": {"immediate_grad_update": True},
}


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("1 1 2 zero1", WITHOUT_OVERLAP),
        ("1 1 2 zero1", OVERLAPPING),
        ("1 1 2 zero2", WITHOUT_OVERLAP),
        ("1 1 2 zero3", WITHOUT_OVERLAP),
        ("1 1 2 bf16", WITHOUT_OVERLAP),
        ("1 1 2 zero2 bf16", OVERLAPPING),
        ("1 1 2 zero3", OVERLAPPING),
    ],
)
def test_expert_keys_change_neither_curve_nor_checkpoint(
    worlds: Worlds, source: Any, tmp_path: Path, name: str, expert: dict[str, Any]
) -> None:
    """DeepSpeed's keys that change how numbers are stored and communicated, in two groups."""
    layout = parse(name)
    tree = merge(layout.tree(), {"deepspeed": expert})
    _, plain = source(layout)
    path, curve = worlds.run(layout.world, uninterrupted, tree, tmp_path / "first")[0]
    np.testing.assert_allclose(curve, plain, rtol=BOUND[layout.precision])
    again, continued = worlds.run(layout.world, resumed, tree, path, tmp_path / "second")[0]
    assert_same_contents(path, again)
    assert continued == curve
