"""Saving while training goes on, on disks that are full or read-only, and what is kept."""

from __future__ import annotations

import json
import os
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from hg_scale.checkpoint.find import damage, find_latest, read_manifest
from hg_scale.checkpoint.load import CheckpointReader
from tests.convert.verified import verify
from tests.disks import Mount, make_read_only, mount
from tests.runs import Finished, curve, run_train, train, train_in
from tests.training.resumable import Run, parse
from tests.world import Worlds

Start = Callable[..., Finished]
__all__ = ["mount"]


@pytest.fixture
def start(worlds: Worlds, config: Path, tmp_path: Path) -> Start:
    """`start(size, key=value, ...)` trains in a world of `size` into `tmp_path / run`."""

    def start(size: int, *sets: str, options: tuple[str, ...] = ()) -> Finished:
        return train_in(
            worlds, size, tmp_path, *arguments(config, tmp_path / "run", sets), *options
        )

    return start


def arguments(config: Path, run: Path, sets: tuple[str, ...]) -> list[str]:
    overrides = [word for key in sets for word in ("--set", key)]
    return ["--config", str(config), "--run", str(run), *overrides]


def steps(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in folder.glob("step-*"))


def save_and_train(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Saves at steps 1 and 2, each held back until two more steps are done; one at once."""
    from hg_scale.training import checkpointer as module
    from hg_scale.training.state import TrainingProgress

    run = Run(tree)
    go_on, order = threading.Event(), []
    write = module.write_checkpoint

    def held_back(folder: Path, step: int, *rest: Any, **more: Any) -> Path:
        assert threading.current_thread() is not threading.main_thread()
        if step == 2:
            assert go_on.wait(60)
        path = write(folder, step, *rest, **more)
        order.append(f"written {step}")
        return path

    with mock.patch.object(module, "write_checkpoint", held_back):
        saver = module.Saver(run.engine, folder, run.config, last_step=4, warn=order.append)
        with saver:
            curve = run.train(1, 2)
            saver.save(TrainingProgress(2))
            run.save(folder / "at_once", 2)  # while the other is being written
            curve += run.train(3, 2)
            order.append("trained")
            go_on.set()
            saver.save(TrainingProgress(4))
            order.append("copied 4")
    run.save(folder / "at_once", 4)
    return {"curve": curve, "order": order}


@pytest.mark.parametrize("layout", ["1 1 2 zero0", "1 1 2 zero3 bf16", "2 1 1"])
def test_training_goes_on_while_a_copy_is_written(
    worlds: Worlds, tmp_path: Path, layout: str
) -> None:
    """What is written is the state at the save, not that of the steps since; saves take turns."""
    here = parse(layout)
    results = worlds.run(here.world, save_and_train, here.tree(), tmp_path)
    assert results[0]["curve"] == worlds.run(here.world, train_only, here.tree())[0]
    for result in results:
        assert [w for w in result["order"] if w != "copied 4"] == [
            "trained",
            "written 2",
            "written 4",
        ]
        assert result["order"].index("copied 4") > 1
    for step in (2, 4):
        path, at_once = (folder / f"step-{step:08}" for folder in (tmp_path, tmp_path / "at_once"))
        verify(path)
        files = [json.loads((p / "manifest.json").read_text())["files"] for p in (path, at_once)]
        assert files[0] == files[1]  # checksums too


def train_only(tree: dict[str, Any]) -> Any:
    return Run(tree).train(1, 4)


@pytest.mark.parametrize("layout", ["1 1 2 zero0", "2 1 1", "2 1 2 zero0", "2 1 2 zero1"])
def test_copies_are_written_once_and_evenly(worlds: Worlds, tmp_path: Path, layout: str) -> None:
    """One file a rank, of nearly equal sizes, and nothing in two of them."""
    here = parse(layout)
    path = worlds.run(here.world, save_only, here.tree(), tmp_path)[0]
    verify(path)
    files = read_manifest(path)["files"]
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", *(f["name"] for f in files)]
    assert len(files) == here.world
    written = [sum(f["length"] for f in file["fragments"]) for file in files]
    assert sum(written) == sum(
        torch.Size(s).numel() for s in CheckpointReader(path).shapes.values()
    )
    assert max(written) - min(written) <= 4  # alignment of ZeRO's partitions


def save_only(tree: dict[str, Any], folder: Path) -> Path:
    run = Run(tree)
    run.train(1, 1)
    return run.save(folder, 1)


@pytest.mark.parametrize("kind", ["true", "false"])
def test_what_is_kept(start: Start, tmp_path: Path, kind: str) -> None:
    sets = ("checkpoint.every=1", "checkpoint.keep_last=2", "checkpoint.keep_every=3")
    assert start(1, *sets, f"checkpoint.async={kind}", "training.steps=8").code == 0
    folder = tmp_path / "run" / "checkpoints"
    assert steps(folder) == [3, 6, 7, 8]
    assert (folder / "latest").read_text() == "step-00000008\n"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["checkpoint"]["async"] in (
        kind == "true",
    )
    for path in folder.glob("step-*"):
        assert damage(path) is None


def test_one_found_damaged_is_not_among_those_kept(start: Start, tmp_path: Path) -> None:
    """A flipped bit in the newest: named, passed over, and it costs no good one its place."""
    folder = tmp_path / "run" / "checkpoints"
    assert start(1, "checkpoint.every=2", options=("--stop-at", "4")).code == 0
    flip(folder / "step-00000004" / "rank-00000.safetensors")
    done = start(1, "checkpoint.every=5", "checkpoint.keep_last=2")
    assert done.code == 0, done.output
    assert "step-00000004: rank-00000.safetensors: changed since it was written" in done.output
    assert "resumed at step 2" in done.output
    assert steps(folder) == [5, 6]
    assert [step for step, _, _ in curve(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def test_a_flipped_bit_and_an_empty_latest(start: Start, tmp_path: Path) -> None:
    """Each has its line; each rank checks files of its own; all damaged: nothing begins anew."""
    folder = tmp_path / "run" / "checkpoints"
    assert start(2, "checkpoint.every=2", options=("--stop-at", "4")).code == 0
    flip(folder / "step-00000004" / "rank-00001.safetensors")
    (folder / "latest").write_text("")
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    done = start(2, options=("--stop-at", "5"))
    assert done.code == 0, done.output
    lines = done.output.splitlines()
    newest = folder / "step-00000004"
    assert (
        f"passing over {newest}: rank-00001.safetensors: changed since it was written "
        "(checksum differs)" in lines
    )
    assert f"{folder / 'latest'} names nothing; taking step-00000002" in lines
    assert any(line.startswith(f"resumed at step 2 from {folder}/step-00000002") for line in lines)

    shutil.rmtree(tmp_path / "run")
    (tmp_path / "before").rename(tmp_path / "run")
    flip(folder / "step-00000002" / "rank-00000.safetensors")
    done = start(2)
    assert done.code == 1
    (line,) = done.output.splitlines()
    assert line.startswith(f"{folder}: none of the checkpoints here is whole (the newest, step-0")


def test_another_layout_is_told(start: Start) -> None:
    assert start(2, "parallel.tensor=2", options=("--stop-at", "2")).code == 0
    done = start(1, options=("--stop-at", "3"))
    (line,) = (line for line in done.output.splitlines() if line.startswith("resumed"))
    assert line.endswith("written by TP2 x PP1 x DP1, ZeRO 1; now TP1 x PP1 x DP1, ZeRO 1")
    done = start(1, options=("--stop-at", "4"))
    (line,) = (line for line in done.output.splitlines() if line.startswith("resumed"))
    assert line.endswith("step-00000003")
    done = start(1, "training.seed=2", options=("--stop-at", "5"))
    assert "training.seed is 2, that of step-00000004 was 1: the data goes on in an" in done.output


def test_processes_that_do_not_divide_the_batch(config: Path, tmp_path: Path) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    done = train("--config", str(config), "--run", str(tmp_path / "run"), environment=place)
    assert done.returncode == 2
    assert "data-parallel sizes that fit: 1, 2, 4" in done.stderr


NOT_SAVED = "warning (rank 0): step {} not saved: rank {} could not "
GOES_ON = "older checkpoints are kept, the run goes on"


@pytest.mark.parametrize("kind", ["true", "false"])
def test_a_full_disk(start: Start, mount: Mount, tmp_path: Path, kind: str) -> None:
    """Room for one checkpoint only: a line for each save that fails, and training goes on."""
    folder = tmp_path / "run" / "checkpoints"
    mount(folder, 8 << 20)
    sets = ("checkpoint.every=2", f"checkpoint.async={kind}")
    assert start(2, *sets, options=("--stop-at", "2")).code == 0
    used = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    filler = folder / "filler"
    with filler.open("wb") as file:  # leave room for half of the next one
        file.truncate(0)
        file.write(bytes((8 << 20) - used - used // 2))
    done = start(2, *sets)
    assert done.code == 1
    *before, last = [line for line in done.output.splitlines() if "not saved" in line]
    (warning,) = before
    assert warning.startswith("warning (rank 0): step 4 not saved: rank ")
    assert "could not write its file: No space left on device" in warning
    assert warning.endswith(GOES_ON)
    assert last.startswith("step 6 not saved: rank ") and "start again" in last
    assert [step for step, _, _ in curve(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert {p.name for p in folder.iterdir()} == {"filler", "latest", "step-00000002"}
    path = find_latest(folder)
    assert path is not None
    verify(path)

    filler.unlink()
    done = start(2, *sets)
    assert done.code == 0 and "resumed at step 2" in done.output
    assert steps(folder) == [2, 4, 6]


def test_a_disk_that_becomes_read_only(start: Start, mount: Mount, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    mount(folder, 8 << 20)
    assert start(1, options=("--stop-at", "2")).code == 0
    make_read_only(folder)
    done = start(1, "checkpoint.every=2")
    assert done.code == 1
    warning, last = (line for line in done.output.splitlines() if "not saved" in line)
    assert warning.startswith(NOT_SAVED.format(4, 0) + "prepare the folder: Read-only file system")
    assert last.startswith("step 6 not saved: rank 0 could not prepare the folder: Read-only file")
    assert [step for step, _, _ in curve(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert find_latest(folder) == folder / "step-00000002"


def test_a_run_folder_that_cannot_be_written(start: Start, mount: Mount, tmp_path: Path) -> None:
    """From the start: one line, and no traceback."""
    folder = tmp_path / "run"
    mount(folder, 8 << 20)
    make_read_only(folder)
    done = start(1)
    assert done.code == 1
    (line,) = done.output.splitlines()
    assert line.startswith(f"{folder}: rank 0 cannot write there: ")
    assert "Read-only file system" in line


def train_with_small_files(words: list[str], output: Path, rank: int) -> int:
    """`run_train`, where the `rank`-th may write no file of more than 300 kB: a quota of sorts."""
    if dist.get_rank() != rank:
        return run_train(words, output)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        return run_train(words, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_quota_of_one_rank(worlds: Worlds, config: Path, tmp_path: Path) -> None:
    """All ranks give the save up, none hangs, and the run trains on to its end."""
    run, output = tmp_path / "run", tmp_path / "terminal"
    words = arguments(config, run, ("checkpoint.every=3", "parallel.tensor=2"))
    assert worlds.run(2, train_with_small_files, words, output, 1) == [1, 1]
    told = "".join(Path(f"{output}-{rank}").read_text() for rank in (0, 1))
    warning, last = (line for line in told.splitlines() if "not saved" in line)
    assert warning.startswith(NOT_SAVED.format(3, 1) + "write its file: File too large")
    assert last.startswith("step 6 not saved: rank 1 could not write its file: File too large")
    assert "Traceback" not in told
    assert [step for step, _, _ in curve(run)] == [1, 2, 3, 4, 5, 6]
    assert list((run / "checkpoints").iterdir()) == []


def without_memory(tree: dict[str, Any], folder: Path) -> list[str]:
    """A save for whose copy one rank lacks the memory, and one that finds it."""
    from hg_scale.training.checkpointer import Checkpointer
    from hg_scale.training.state import TrainingProgress

    told: list[str] = []
    run = Run(tree)
    empty = torch.empty

    def fail(*size: Any, **more: Any) -> torch.Tensor:
        if more.get("dtype") == torch.float32 and os.environ["RANK"] == "1":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore of it")
        return empty(*size, **more)

    with Checkpointer(run.engine, folder, run.config, last_step=2, warn=told.append) as saver:
        run.train(1, 1)
        with mock.patch.object(torch, "empty", fail):
            saver.save(TrainingProgress(1))
            saver.wait()
        run.train(2, 1)
        saver.save(TrainingProgress(2))
    return told


def test_no_memory_for_the_copy(worlds: Worlds, tmp_path: Path) -> None:
    here = parse("1 1 2")
    told, nothing = worlds.run(here.world, without_memory, here.tree(), tmp_path)
    assert nothing == [] and len(told) == 1
    assert "rank 1 could not write its file: MemoryError: no host memory for a copy" in told[0]
    assert steps(tmp_path) == [2]
