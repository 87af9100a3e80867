"""A rank that is killed at any system operation of a save leaves a complete checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.find import find_latest
from hg_scale.checkpoint.fragments import KINDS, Fragment, Slice
from hg_scale.checkpoint.manifest import read_manifest
from hg_scale.checkpoint.rank_file import LocalState, stage
from hg_scale.checkpoint.retention import RetentionPolicy
from hg_scale.checkpoint.save import write_checkpoint
from tests.convert.verified import verify
from tests.forks import KILLED, Forks, die_at
from tests.manifests import meta


@pytest.fixture(scope="module")
def forks() -> Forks:
    return Forks("tests.checkpoint.test_killed")


def write(folder: Path, step: int, victim: int = -1, moment: int = 0) -> None:
    """Save from two ranks, keeping one older checkpoint; the victim dies at operation `moment`."""
    rank = dist.get_rank()
    piece = Slice("head.weight", (4, 6), 1, rank, 2)
    values = torch.full((12,), float(step))
    state = LocalState(
        nn.Parameter(values), Fragment(piece, 0, 12), dict.fromkeys(KINDS, values.clone())
    )
    if rank == victim:
        die_at(moment, str(folder))
    try:
        policy = RetentionPolicy(last=2)
        write_checkpoint(folder, step, lambda: stage([state]), meta(step), retention=policy)
    except (CheckpointError, RuntimeError):
        raise SystemExit(3) from None  # the other rank is gone


@pytest.mark.parametrize("victim", [0, 1])
def test_kill_at_every_operation_of_a_save(forks: Forks, tmp_path: Path, victim: int) -> None:
    """The third save removes the first checkpoint; after the kill the next save works."""
    for step in (1, 2):
        assert forks.run(2, write, tmp_path / "before", step) == [0, 0]
    moment = deaths = 0
    results = []
    while deaths == moment:
        moment += 1
        folder = Path(shutil.copytree(tmp_path / "before", tmp_path / str(moment)))
        codes = forks.run(2, write, folder, 3, victim, moment)
        deaths += codes[victim] == KILLED
        assert codes[1 - victim] in (0, 3)
        found = find_latest(folder)
        assert found is not None
        verify(found)
        step = read_manifest(found)["step"]
        results.append(step)
        assert step in (2, 3)
        latest = folder / (folder / "latest").read_text().strip()
        verify(latest)  # it may still name the previous one
        assert forks.run(2, write, folder, 4) == [0, 0]
        names = sorted(p.name for p in folder.iterdir())
        assert names[0] == "latest" and names[-1] == "step-00000004", names
        assert len(names) == 3, names
    assert results == sorted(results)  # once renamed into place, it stays
    assert (results[0], results[-1]) == (2, 3)
    assert moment > (15 if victim == 0 else 1)
