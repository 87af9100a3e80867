"""Asynchronous saves, saves to full and read-only disks, and which checkpoints are kept."""

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

from hg_scale.checkpoint.find import find_latest, verify_sizes
from hg_scale.checkpoint.load import CheckpointReader
from hg_scale.checkpoint.manifest import read_manifest
from tests.convert.verified import verify
from tests.disks import Mount, make_read_only, mount
from tests.runs import Finished, arguments, curve, run_train, train, train_in
from tests.training.resumable import Run, parse
from tests.world import Worlds

Start = Callable[..., Finished]
__all__ = ["mount"]


@pytest.fixture
def start(worlds: Worlds, config: Path, tmp_path: Path) -> Start:
    """`start(size, key=value, ...)` trains on `size` ranks into `tmp_path / run`."""

    def start(size: int, *sets: str, options: tuple[str, ...] = ()) -> Finished:
        command_line = arguments(config, tmp_path / "run", *sets)
        return train_in(worlds, size, tmp_path, *command_line, *options)

    return start


def steps(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in folder.glob("step-*"))


def save_and_train(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Save at steps 2 and 4 while a thread writes; the write of step 2 waits for step 4."""
    from hg_scale.training import checkpointer as module
    from hg_scale.training.state import TrainingProgress

    run = Run(tree)
    trained, order = threading.Event(), []
    write = module.write_checkpoint

    def wait_and_write(folder: Path, step: int, *rest: Any, **more: Any) -> Path:
        assert threading.current_thread() is not threading.main_thread()
        if step == 2:
            assert trained.wait(60)
        path = write(folder, step, *rest, **more)
        order.append(f"written {step}")
        return path

    with (
        mock.patch.object(module, "write_checkpoint", wait_and_write),
        module.Checkpointer(
            run.engine, folder, run.config, last_step=4, warn=order.append
        ) as checkpointer,
    ):
        curve = run.train(1, 2)
        checkpointer.save(TrainingProgress(2))
        run.save(folder / "synchronous", 2)  # while the thread writes the same step
        curve += run.train(3, 2)
        order.append("trained")
        trained.set()
        checkpointer.save(TrainingProgress(4))
        order.append("copied 4")
    run.save(folder / "synchronous", 4)
    return {"curve": curve, "order": order}


@pytest.mark.parametrize("layout", ["1 1 2 zero0", "1 1 2 zero3 bf16", "2 1 1"])
def test_training_continues_while_a_checkpoint_is_written(
    worlds: Worlds, tmp_path: Path, layout: str
) -> None:
    """The checkpoint has the state of the step at which it was saved; saves do not overlap."""
    parsed = parse(layout)
    results = worlds.run(parsed.world, save_and_train, parsed.tree(), tmp_path)
    assert results[0]["curve"] == worlds.run(parsed.world, train_only, parsed.tree())[0]
    for result in results:
        assert [entry for entry in result["order"] if entry != "copied 4"] == [
            "trained",
            "written 2",
            "written 4",
        ]
        assert result["order"].index("copied 4") > 1
    for step in (2, 4):
        path, expected = (
            folder / f"step-{step:08}" for folder in (tmp_path, tmp_path / "synchronous")
        )
        verify(path)
        files = [json.loads((p / "manifest.json").read_text())["files"] for p in (path, expected)]
        assert files[0] == files[1]  # with checksums


def train_only(tree: dict[str, Any]) -> Any:
    return Run(tree).train(1, 4)


@pytest.mark.parametrize("layout", ["1 1 2 zero0", "2 1 1", "2 1 2 zero0", "2 1 2 zero1"])
def test_replicated_state_is_written_once_in_equal_shares(
    worlds: Worlds, tmp_path: Path, layout: str
) -> None:
    """One file per rank, of nearly equal sizes, without duplicates."""
    parsed = parse(layout)
    path = worlds.run(parsed.world, save_only, parsed.tree(), tmp_path)[0]
    verify(path)
    files = read_manifest(path)["files"]
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", *(f["name"] for f in files)]
    assert len(files) == parsed.world
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
def test_old_checkpoints_are_deleted(start: Start, tmp_path: Path, kind: str) -> None:
    sets = ("checkpoint.every=1", "checkpoint.keep_last=2", "checkpoint.keep_every=3")
    assert start(1, *sets, f"checkpoint.async={kind}", "training.steps=8").code == 0
    folder = tmp_path / "run" / "checkpoints"
    assert steps(folder) == [3, 6, 7, 8]
    assert (folder / "latest").read_text() == "step-00000008\n"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["checkpoint"]["async"] in (
        kind == "true",
    )
    for path in folder.glob("step-*"):
        assert verify_sizes(path) is None


def test_a_corrupt_checkpoint_does_not_count_as_kept(start: Start, tmp_path: Path) -> None:
    """A flipped bit in the newest: it is reported and skipped, and no intact one is deleted."""
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
    """Both are reported, also from rank 1; if all checkpoints are corrupt, nothing starts."""
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
        f"skipping {newest}: rank-00001.safetensors: changed since it was written "
        "(checksum differs)" in lines
    )
    assert f"{folder / 'latest'} names nothing; using step-00000002" in lines
    assert any(line.startswith(f"resumed at step 2 from {folder}/step-00000002") for line in lines)

    shutil.rmtree(tmp_path / "run")
    (tmp_path / "before").rename(tmp_path / "run")
    flip(folder / "step-00000002" / "rank-00000.safetensors")
    done = start(2)
    assert done.code == 1
    (line,) = done.output.splitlines()
    assert line.startswith(f"{folder}: none of the checkpoints is complete (the newest, step-0")


def test_a_changed_layout_and_seed_are_reported(start: Start) -> None:
    assert start(2, "parallel.tensor=2", options=("--stop-at", "2")).code == 0
    done = start(1, options=("--stop-at", "3"))
    (line,) = (line for line in done.output.splitlines() if line.startswith("resumed"))
    assert line.endswith("written by TP2 x PP1 x DP1, ZeRO 1; now TP1 x PP1 x DP1, ZeRO 1")
    done = start(1, options=("--stop-at", "4"))
    (line,) = (line for line in done.output.splitlines() if line.startswith("resumed"))
    assert line.endswith("step-00000003")
    done = start(1, "training.seed=2", options=("--stop-at", "5"))
    warning = "training.seed is 2 but step-00000004 used 1: the data continues in another order"
    assert warning in done.output


def test_processes_that_do_not_divide_the_batch(config: Path, tmp_path: Path) -> None:
    launch = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    done = train("--config", str(config), "--run", str(tmp_path / "run"), environment=launch)
    assert done.returncode == 2
    assert "data-parallel sizes that fit: 1, 2, 4" in done.stderr


NOT_SAVED = "warning (rank 0): step {} not saved: rank {} could not "
CONTINUES = "older checkpoints are kept, the run continues"


@pytest.mark.parametrize("kind", ["true", "false"])
def test_a_full_disk(start: Start, mount: Mount, tmp_path: Path, kind: str) -> None:
    """Space for one checkpoint only: one line for each save that fails, and training continues."""
    folder = tmp_path / "run" / "checkpoints"
    mount(folder, 8 << 20)
    sets = ("checkpoint.every=2", f"checkpoint.async={kind}")
    assert start(2, *sets, options=("--stop-at", "2")).code == 0
    used = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    filler = folder / "filler"
    with filler.open("wb") as file:  # leave space for half of the next checkpoint
        file.truncate(0)
        file.write(bytes((8 << 20) - used - used // 2))
    done = start(2, *sets)
    assert done.code == 1
    warning, last = (line for line in done.output.splitlines() if "not saved" in line)
    assert warning.startswith("warning (rank 0): step 4 not saved: rank ")
    assert "could not write its file: No space left on device" in warning
    assert warning.endswith(CONTINUES)
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
    """It is reported in one line, without a traceback."""
    folder = tmp_path / "run"
    mount(folder, 8 << 20)
    make_read_only(folder)
    done = start(1)
    assert done.code == 1
    (line,) = done.output.splitlines()
    assert line.startswith(f"{folder}: rank 0 cannot write to it: ")
    assert "Read-only file system" in line


def train_with_file_size_limit(command_line: list[str], output: Path, rank: int) -> int:
    """Train; rank `rank` cannot write files of more than 300 kB, as with a disk quota."""
    if dist.get_rank() != rank:
        return run_train(command_line, output)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        return run_train(command_line, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_of_one_rank_abandons_the_save(
    worlds: Worlds, config: Path, tmp_path: Path
) -> None:
    """On all ranks; none hangs, and the run trains to its last step."""
    run, output = tmp_path / "run", tmp_path / "terminal"
    command_line = arguments(config, run, "checkpoint.every=3", "parallel.tensor=2")
    assert worlds.run(2, train_with_file_size_limit, command_line, output, 1) == [1, 1]
    text = "".join(Path(f"{output}-{rank}").read_text() for rank in (0, 1))
    warning, last = (line for line in text.splitlines() if "not saved" in line)
    assert warning.startswith(NOT_SAVED.format(3, 1) + "write its file: File too large")
    assert last.startswith("step 6 not saved: rank 1 could not write its file: File too large")
    assert "Traceback" not in text
    assert [step for step, _, _ in curve(run)] == [1, 2, 3, 4, 5, 6]
    assert list((run / "checkpoints").iterdir()) == []


def save_out_of_memory(tree: dict[str, Any], folder: Path) -> list[str]:
    """Save step 1 while rank 1 is out of host memory, and step 2 normally; return the warnings."""
    from hg_scale.training.checkpointer import Checkpointer
    from hg_scale.training.state import TrainingProgress

    warnings: list[str] = []
    run = Run(tree)
    empty = torch.empty

    def fail(*size: Any, **more: Any) -> torch.Tensor:
        if more.get("dtype") == torch.float32 and os.environ["RANK"] == "1":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore of it")
        return empty(*size, **more)

    with Checkpointer(
        run.engine, folder, run.config, last_step=2, warn=warnings.append
    ) as checkpointer:
        run.train(1, 1)
        with mock.patch.object(torch, "empty", fail):
            checkpointer.save(TrainingProgress(1))
            checkpointer.wait()
        run.train(2, 1)
        checkpointer.save(TrainingProgress(2))
    return warnings


def test_out_of_host_memory_for_the_copy_is_a_failed_save(worlds: Worlds, tmp_path: Path) -> None:
    layout = parse("1 1 2")
    warnings, others = worlds.run(layout.world, save_out_of_memory, layout.tree(), tmp_path)
    assert others == [] and len(warnings) == 1
    assert "rank 1 could not write its file: MemoryError: no host memory for a copy" in warnings[0]
    assert steps(tmp_path) == [2]
