"""Which checkpoints may go, and that the only good one never does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hg_scale.checkpoint.find import damage, find_latest, folder_name
from hg_scale.checkpoint.rank_file import gather, write_rank_file
from hg_scale.checkpoint.retention import Keep, prune, remove_leftovers, superseded
from hg_scale.checkpoint.save import _write_manifest
from tests.checkpoint.test_rank_file import states
from tests.manifests import META

STEPS = st.sets(st.integers(1, 60))


@given(STEPS, STEPS, st.integers(0, 5), st.integers(0, 12))
def test_what_goes(whole: set[int], damaged: set[int], last: int, every: int) -> None:
    damaged -= whole
    gone = set(superseded(sorted(whole), sorted(damaged), Keep(last, every)))
    left = whole - gone
    assert gone <= whole | damaged
    if not last or not whole:
        assert not gone
        return
    newest = set(sorted(whole)[-last:])
    assert newest <= left  # damaged ones take no place among them
    assert left == newest | {s for s in whole if every and s % every == 0}
    assert all(s < min(newest) for s in gone)


def checkpoint(folder: Path, step: int) -> Path:
    """A whole one, of one rank."""
    path = folder / folder_name(step)
    path.mkdir(parents=True)
    entry = write_rank_file(path / "rank-00000.safetensors", gather(states(3)))
    _write_manifest(path, step, [entry], META)
    assert damage(path) is None
    return path


def test_a_parameter_that_no_rank_wrote(tmp_path: Path) -> None:
    entry = write_rank_file(tmp_path / "rank-00000.safetensors", gather(states(3)))
    with pytest.raises(ValueError, match="p1: no rank wrote it"):
        _write_manifest(tmp_path, 1, [entry], META, ["p0", "p1"])
    assert not (tmp_path / "manifest.json").exists()


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def test_files_are_removed(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50, 60):
        checkpoint(tmp_path, step)
    assert prune(tmp_path, 50, Keep()) == []
    assert len(steps(tmp_path)) == 6
    assert prune(tmp_path, 50, Keep(2, 20)) == []
    assert steps(tmp_path) == [20, 40, 50, 60]  # 60 is of a course that was left


def test_damaged_ones_do_not_count(tmp_path: Path) -> None:
    """Known by their sizes, or to the caller by their contents."""
    paths = {step: checkpoint(tmp_path, step) for step in (10, 20, 30, 40, 50)}
    (paths[30] / "manifest.json").unlink()
    assert prune(tmp_path, 50, Keep(3), damaged={paths[40]}) == []
    assert steps(tmp_path) == [10, 20, 30, 40, 50]
    checkpoint(tmp_path, 60)
    assert prune(tmp_path, 60, Keep(2), damaged={paths[40]}) == []
    assert steps(tmp_path) == [50, 60]


def test_a_folder_that_cannot_be_listed(tmp_path: Path) -> None:
    """A line, and no error that would end the saving thread of one rank."""
    (told,) = prune(tmp_path / "missing", 50, Keep(1))
    assert told.endswith(
        "cannot be listed, and keeps what is superseded: No such file or directory"
    )


def test_the_one_just_saved_stays_whatever_is_newer(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint(tmp_path, step)
    assert prune(tmp_path, 20, Keep(1)) == []
    assert steps(tmp_path) == [20, 30]
    shutil.rmtree(tmp_path / folder_name(30))
    assert find_latest(tmp_path) == tmp_path / folder_name(20)


def test_leftovers_of_saves_and_removals_go(tmp_path: Path) -> None:
    kept = checkpoint(tmp_path, 10)
    for name in (".step-00000020.tmp", ".step-00000005.old"):
        shutil.copytree(kept, tmp_path / name)
    (tmp_path / ".notes").touch()
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".notes", kept.name]
