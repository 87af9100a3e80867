"""Save in one layout, go on in any other: the curve is the undisturbed run's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hg_scale.checkpoint.fragments import KINDS
from hg_scale.checkpoint.load import Reader, verify
from hg_scale.config.load import parse_config
from tests.training.models import BY_LEVEL, PAPER, layout, random_batch
from tests.world import Worlds

BEFORE, AFTER = 2, 2  # steps before and after the save
BOUND = {"fp32": 1e-4, "bf16": 1e-2}  # relative
MODELS = {"paper": PAPER, "by_level": BY_LEVEL}


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: int = 1
    precision: str = "fp32"
    model: str = "paper"

    @property
    def world(self) -> int:
        return self.tensor * self.pipeline * self.data

    def tree(self) -> dict[str, Any]:
        return layout(
            MODELS[self.model], self.tensor, self.pipeline, self.zero, self.precision, micro=2
        )

    def __str__(self) -> str:
        sizes = f"tp{self.tensor}pp{self.pipeline}dp{self.data}"
        return f"{sizes}-zero{self.zero}-{self.precision}-{self.model}"


def parse(text: str) -> Layout:
    """As in "2 1 2 zero1 bf16": tensor, pipeline, data, ..."""
    sizes, words = text.split()[:3], text.split()[3:]
    zero = next((int(w[4]) for w in words if w.startswith("zero")), 1)
    precision = "bf16" if "bf16" in words else "fp32"
    return Layout(*map(int, sizes), zero, precision, "by_level" if "by_level" in words else "paper")


SAME = [
    *("1 1 1 zero0", "1 2 1 zero0", "1 1 2 zero1", "1 1 2 zero2", "2 1 2 zero3", "2 2 2"),
    *("1 1 2 zero3 bf16", "2 1 2 bf16", "2 1 2 zero2 bf16", "2 2 2 bf16"),
    "2 1 2 zero3 by_level",
]
"""Each of DeepSpeed's optimizers, with and without tensor parallelism and stages."""
PAIRS = [
    *(("2 2 2", reader) for reader in ("1 1 1 zero0", "1 1 2 zero2", "2 1 2 zero3", "1 2 2")),
    *((writer, "2 1 1") for writer in ("1 2 1 zero0", "1 1 2 zero2")),
    ("2 1 2 zero3", "2 2 2"),
    ("2 2 2 bf16", "2 1 2 zero3 bf16"),
    ("1 1 2 zero3 bf16", "1 2 1 bf16"),
    ("2 1 2 zero3 by_level", "2 2 1 by_level"),
]
"""Writer and reader: each optimizer reads and is read, across tensor, pipeline and data sizes."""


class Run:
    """A training run in this world, step by step."""

    def __init__(self, tree: dict[str, Any]) -> None:

        from hg_scale.parallel.mesh import make_mesh
        from hg_scale.training.engine import make_engine

        self.config = parse_config(tree, world_size=dist.get_world_size())
        self.mesh, parts = make_mesh(self.config.parallel)
        self.engine = make_engine(self.config, self.mesh, parts, torch.device("cpu"))

    def train(self, first: int, count: int) -> list[tuple[float, float]]:
        """(loss, gradient norm) of each step."""
        reads = self.mesh.is_first_stage or self.mesh.is_last_stage
        begin = self.mesh.data_rank * self.engine.rows
        rows = slice(begin, begin + self.engine.rows)
        results = []
        for step in range(first, first + count):
            batch = random_batch(self.config, step)[rows] if reads else None
            result = self.engine.train_step(batch, step, 1e-3 / step)
            results.append((result.loss, result.grad_norm))
        return results

    def save(self, folder: Path, step: int) -> Path:
        from hg_scale.training.loop import Progress
        from hg_scale.training.state import save_state

        return save_state(self.engine, folder, Progress(step, 17, 0), self.config)


def undisturbed(tree: dict[str, Any], folder: Path) -> tuple[Path, list[tuple[float, float]]]:
    """Train, save, and train on."""
    run = Run(tree)
    run.train(1, BEFORE)
    path = run.save(folder, BEFORE)
    return path, run.train(BEFORE + 1, AFTER)


def resumed(
    tree: dict[str, Any], path: Path, folder: Path
) -> tuple[Path, list[tuple[float, float]]]:
    """Load in this layout, save at once what was loaded, and train on."""
    from hg_scale.training.state import load_state

    run = Run(tree)
    progress = load_state(run.engine, path)
    assert (progress.step, progress.position) == (BEFORE, 17)
    again = run.save(folder, BEFORE)
    return again, run.train(BEFORE + 1, AFTER)


@pytest.fixture(scope="module")
def source(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The checkpoint of a layout and the curve after it, made once."""
    cache: dict[Layout, Any] = {}

    def get(layout: Layout) -> tuple[Path, list[tuple[float, float]]]:
        if layout not in cache:
            folder = tmp_path_factory.mktemp("source")
            cache[layout] = worlds.run(layout.world, undisturbed, layout.tree(), folder)[0]
        return cache[layout]

    return get


def assert_same_contents(a: Path, b: Path) -> None:
    """Weights, moments and counters are bit-equal, whatever layouts wrote them."""
    first, second = Reader(a), Reader(b)
    assert first.shapes == second.shapes
    assert first.manifest["optimizer_step"] == second.manifest["optimizer_step"] == BEFORE
    for name in first.shapes:
        for kind in KINDS:
            assert torch.equal(first.whole(name, kind), second.whole(name, kind)), (name, kind)


@pytest.mark.parametrize("name", SAME)
def test_bit_equal_in_the_same_layout(
    worlds: Worlds, source: Any, tmp_path: Path, name: str
) -> None:
    here = parse(name)
    path, curve = source(here)
    verify(path)
    again, continued = worlds.run(here.world, resumed, here.tree(), path, tmp_path)[0]
    assert continued == curve
    assert_same_contents(path, again)


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_goes_on_in_another_layout(
    worlds: Worlds, source: Any, tmp_path: Path, writer: str, reader: str
) -> None:
    path, curve = source(parse(writer))
    here = parse(reader)
    again, continued = worlds.run(here.world, resumed, here.tree(), path, tmp_path)[0]
    assert_same_contents(path, again)
    np.testing.assert_allclose(continued, curve, rtol=BOUND[here.precision])
