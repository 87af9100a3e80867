"""Retention removes old checkpoints, and never the only complete one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hg_scale.checkpoint.find import find_latest, folder_name, verify_sizes
from hg_scale.checkpoint.rank_file import stage, write_rank_file
from hg_scale.checkpoint.retention import RetentionPolicy, prune, remove_leftovers, steps_to_remove
from hg_scale.checkpoint.save import _write_manifest
from tests.checkpoint.test_rank_file import states
from tests.manifests import meta

STEPS = st.sets(st.integers(1, 60))


@given(STEPS, STEPS, st.integers(0, 5), st.integers(0, 12))
def test_steps_to_remove(complete: set[int], corrupt: set[int], last: int, every: int) -> None:
    corrupt -= complete
    policy = RetentionPolicy(last, every)
    removed = set(steps_to_remove(sorted(complete), sorted(corrupt), policy))
    kept = complete - removed
    assert removed <= complete | corrupt
    if not last or not complete:
        assert not removed
        return
    newest = set(sorted(complete)[-last:])
    assert newest <= kept  # corrupt ones do not count
    assert kept == newest | {s for s in complete if every and s % every == 0}
    assert all(s < min(newest) for s in removed)


def checkpoint(folder: Path, step: int) -> Path:
    """Write a complete checkpoint of one rank."""
    path = folder / folder_name(step)
    path.mkdir(parents=True)
    entry = write_rank_file(path / "rank-00000.safetensors", stage(states(3)))
    _write_manifest(path, step, [entry], meta(step))
    assert verify_sizes(path) is None
    return path


def test_parameter_that_no_rank_wrote_is_named(tmp_path: Path) -> None:
    entry = write_rank_file(tmp_path / "rank-00000.safetensors", stage(states(3)))
    with pytest.raises(ValueError, match="p1: no rank wrote it"):
        _write_manifest(tmp_path, 1, [entry], meta(1), ["p0", "p1"])
    assert not (tmp_path / "manifest.json").exists()


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_old_checkpoints_are_removed(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50, 60):
        checkpoint(tmp_path, step)
    assert prune(tmp_path, 50, RetentionPolicy()) == []
    assert len(steps(tmp_path)) == 6
    assert prune(tmp_path, 50, RetentionPolicy(2, 20)) == []
    assert steps(tmp_path) == [20, 40, 50, 60]  # 60 is of an abandoned branch


def test_corrupt_checkpoints_do_not_count(tmp_path: Path) -> None:
    """Found corrupt by their sizes, or by the caller by their checksums."""
    paths = {step: checkpoint(tmp_path, step) for step in (10, 20, 30, 40, 50)}
    (paths[30] / "manifest.json").unlink()
    assert prune(tmp_path, 50, RetentionPolicy(3), corrupt={paths[40]}) == []
    assert steps(tmp_path) == [10, 20, 30, 40, 50]
    checkpoint(tmp_path, 60)
    assert prune(tmp_path, 60, RetentionPolicy(2), corrupt={paths[40]}) == []
    assert steps(tmp_path) == [50, 60]


def test_folder_that_cannot_be_listed(tmp_path: Path) -> None:
    """`prune` returns a line; an error would end the saving thread of one rank."""
    (line,) = prune(tmp_path / "missing", 50, RetentionPolicy(1))
    assert line.endswith("cannot be listed, so old checkpoints stay: No such file or directory")


def test_checkpoint_just_saved_is_kept_even_if_others_are_newer(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint(tmp_path, step)
    assert prune(tmp_path, 20, RetentionPolicy(1)) == []
    assert steps(tmp_path) == [20, 30]
    shutil.rmtree(tmp_path / folder_name(30))
    assert find_latest(tmp_path) == tmp_path / folder_name(20)


def test_leftovers_of_saves_and_removals_are_removed(tmp_path: Path) -> None:
    kept = checkpoint(tmp_path, 10)
    for name in (".step-00000020.tmp", ".step-00000005.old"):
        shutil.copytree(kept, tmp_path / name)
    (tmp_path / ".notes").touch()
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".notes", kept.name]
