"""Save, find and verify checkpoints without an engine: two ranks and one small parameter."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

from hg_scale import atomic_write
from hg_scale.checkpoint import save as module
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.find import find_latest, verify_checksums
from hg_scale.checkpoint.fragments import KINDS, Fragment, Slice
from hg_scale.checkpoint.load import CheckpointReader, read_parameters
from hg_scale.checkpoint.manifest import (
    CHECKPOINT_VERSION,
    MIGRATIONS,
    read_manifest,
    seal,
)
from hg_scale.checkpoint.rank_file import LocalState, stage
from hg_scale.checkpoint.save import _rename_into_place, save_checkpoint
from hg_scale.errors import UserError
from tests.checkpoint.test_rank_file import states
from tests.convert.verified import verify
from tests.manifests import meta
from tests.world import Worlds

FULL = torch.arange(24.0).reshape(4, 6)


def local_states(rank: int, error: str) -> Iterator[LocalState]:
    """A matrix sharded by columns; each rank holds its half, in two fragments."""
    piece = Slice("head.weight", (4, 6), 1, rank, 2)
    flat = FULL.chunk(2, 1)[rank].reshape(-1)
    for start, length in ((0, 5), (5, 7)):
        if error == "disk" and rank == 1 and start:
            raise OSError(errno.ENOSPC, "No space left on device", "rank-00001.safetensors")
        if error == "missing" and rank == 1 and start:
            return
        values = flat[start : start + length]
        if error == "nan" and rank == 1:
            values = values / 0 * 0
        tensors = {kind: values * 10**i for i, kind in enumerate(KINDS)}
        yield LocalState(nn.Parameter(flat), Fragment(piece, start, length), tensors)


def write(folder: Path, step: int, error: str = "") -> str:
    """Save from this rank; return the error's message, empty if there was none."""
    try:
        save_checkpoint(folder, step, local_states(dist.get_rank(), error), meta(step))
    except CheckpointError as raised:
        return str(raised)
    return ""


@pytest.fixture(scope="module")
def written(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("written")
    for step in (1, 2):
        assert worlds.run(2, write, folder, step) == ["", ""]
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of it to be corrupted."""
    return Path(shutil.copytree(written, tmp_path / "checkpoints"))


def test_contents_of_a_checkpoint(written: Path) -> None:
    assert sorted(p.name for p in written.iterdir()) == ["latest", "step-00000001", "step-00000002"]
    assert (written / "latest").read_text() == "step-00000002\n"
    path = find_latest(written)
    assert path == written / "step-00000002"
    manifest = read_manifest(path)
    assert manifest["step"] == 2
    assert manifest["optimizer_step"] == 7
    assert [f["name"] for f in manifest["files"]] == [f"rank-0000{r}.safetensors" for r in (0, 1)]
    verify(path)


def test_files_are_fp32_safetensors(written: Path) -> None:
    with safe_open(written / "step-00000001" / "rank-00001.safetensors", framework="pt") as file:
        assert {str(file.get_tensor(key).dtype) for key in file.keys()} == {"torch.float32"}  # noqa: SIM118


def test_full_tensors_are_read(written: Path) -> None:
    path = written / "step-00000002"
    assert torch.equal(dict(read_parameters(path))["head.weight"], FULL)
    assert torch.equal(CheckpointReader(path).full_tensor("head.weight", "exp_avg_sq"), FULL * 100)


def test_reading_needs_no_cluster_library() -> None:
    code = (
        "import sys, hg_scale.checkpoint.load, hg_scale.checkpoint.save\n"
        "print([m for m in ('deepspeed', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("disk", "rank 1 could not write its file: No space left on device"),
        ("missing", "head.weight: slice 1 of 2, of 12 elements, is covered by"),
    ],
)
def test_failed_save_is_abandoned_by_all_ranks(
    worlds: Worlds, folder: Path, error: str, message: str
) -> None:
    """No rank hangs, nothing partial is left, older checkpoints stay, the next save works."""
    before = sorted(folder.iterdir())
    errors = worlds.run(2, write, folder, 3, error)
    assert errors[0] == errors[1]
    assert message in errors[0]
    assert sorted(folder.iterdir()) == before
    assert find_latest(folder) == folder / "step-00000002"
    assert worlds.run(2, write, folder, 3) == ["", ""]
    assert find_latest(folder) == folder / "step-00000003"


def test_folder_that_cannot_be_created(worlds: Worlds, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    errors = worlds.run(2, write, tmp_path / "file" / "checkpoints", 1)
    assert all("rank 0 could not prepare the folder: Not a directory" in e for e in errors)


def test_saving_a_step_again_replaces_its_corrupt_checkpoint(worlds: Worlds, folder: Path) -> None:
    (folder / "step-00000002" / "manifest.json").unlink()
    assert worlds.run(2, write, folder, 2) == ["", ""]
    assert find_latest(folder) == folder / "step-00000002"
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("change", [{"dim": 5}, {"index": 2}, {"count": 7}])
def test_manifest_with_impossible_slices_is_refused(folder: Path, change: dict[str, int]) -> None:
    path = folder / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][1]["fragments"][0] |= change
    path.write_text(json.dumps(seal(manifest)))
    with pytest.raises(CheckpointError, match="rank-00001.safetensors: head.weight: no slice"):
        CheckpointReader(path.parent)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_save_that_is_not_permitted_changes_nothing(alone: None, tmp_path: Path) -> None:
    """Another run may have locked the folder meanwhile."""

    def refuse() -> None:
        raise UserError("process 1 on n7 is training there")

    partial = tmp_path / "checkpoints" / ".step-00000002.tmp"
    partial.mkdir(parents=True)
    message = "not saved: rank 0 could not prepare the folder: process 1 on n7 is training there"
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        module.write_checkpoint(partial.parent, 1, lambda: stage(states(3)), meta(1), permit=refuse)
    assert [p.name for p in partial.parent.iterdir()] == [partial.name]


def test_latest_is_durable_before_checkpoints_are_removed(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power loss `latest` must not name a checkpoint that was removed."""
    order: list[str] = []
    write, sync = module.write_durable, module.sync_path

    def recorded_write(path: Path, text: str) -> None:
        order.append(f"write {path.name}")
        write(path, text)

    def recorded_sync(folder: Path) -> None:
        order.append(f"sync {folder.name}")
        sync(folder)

    def recorded_prune(*_: object) -> list[str]:
        order.append("prune")
        return []

    monkeypatch.setattr(module, "write_durable", recorded_write)
    monkeypatch.setattr(module, "sync_path", recorded_sync)
    monkeypatch.setattr(atomic_write, "sync_path", recorded_sync)
    monkeypatch.setattr(module, "prune", recorded_prune)
    save_checkpoint(tmp_path / "runs" / "run" / "checkpoints", 1, states(3), meta(1))
    assert order == [
        *("sync run", "sync runs", f"sync {tmp_path.name}"),
        *("write manifest.json", "sync .step-00000001.tmp", "sync checkpoints"),
        *("write latest", "sync checkpoints", "prune"),
    ]


def test_corrupt_checkpoint_is_restored_if_it_cannot_be_replaced(tmp_path: Path) -> None:
    """It may be all that is left of that step."""
    final = tmp_path / "step-00000001"
    final.mkdir()
    (final / "kept").touch()
    with pytest.raises(FileNotFoundError):
        _rename_into_place(tmp_path / "no such folder", final)
    assert [p.name for p in tmp_path.iterdir()] == [final.name]
    assert (final / "kept").exists()


def remove_file(path: Path) -> None:
    (path / "rank-00001.safetensors").unlink()


def truncate_file(path: Path) -> None:
    file = path / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def truncate_manifest(path: Path) -> None:
    file = path / "manifest.json"
    file.write_text(file.read_text()[:100])


def empty_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"format_version": 1}')


def flip_manifest(path: Path) -> None:
    """Change a byte so that the manifest is still valid JSON."""
    file = path / "manifest.json"
    file.write_text(file.read_text().replace('"optimizer_step": 7', '"optimizer_step": 8'))


def newer_version(path: Path) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 9}))


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (remove_file, "rank-00001.safetensors is missing"),
        (truncate_file, "bytes, expected"),
        (remove_manifest, "the save was never finished"),
        (truncate_manifest, "cannot be read"),
        (empty_manifest, "lists no files"),
        (flip_manifest, "manifest.json: changed since it was written"),
        (newer_version, "format version 9, expected 2; update hg_scale"),
    ],
)
def test_corrupt_checkpoint_is_named_and_skipped(
    folder: Path, corrupt: Callable[[Path], None], message: str
) -> None:
    newest = folder / "step-00000002"
    corrupt(newest)
    lines: list[str] = []
    assert find_latest(folder, lines.append) == folder / "step-00000001"
    assert len(lines) == 1
    assert str(newest) in lines[0]
    assert message in lines[0]
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(newest)


def as_version_1(path: Path, sealed: bool) -> None:
    """Rewrite a manifest in format version 1, whose first ones had no checksum of themselves."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text()) | {"format_version": 1}
    del manifest["manifest_checksum"]
    for entry in manifest["files"]:
        del entry["checksum"]
        entry["sha256"] = hashlib.sha256((path / entry["name"]).read_bytes()).hexdigest()
    if sealed:
        text = json.dumps(manifest, sort_keys=True).encode()
        manifest["manifest_sha256"] = hashlib.sha256(text).hexdigest()
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize("sealed", [True, False])
def test_version_1_is_read(folder: Path, sealed: bool) -> None:
    path = folder / "step-00000001"
    current = read_manifest(path)
    as_version_1(path, sealed)
    older = read_manifest(path)
    assert older["format_version"] == CHECKPOINT_VERSION
    assert all(file["checksum"].startswith("sha256:") for file in older["files"])
    for key in current.keys() - {"files", "manifest_checksum"}:
        assert older[key] == current[key]
    verify(path)
    assert torch.equal(CheckpointReader(path).full_tensor("head.weight"), FULL)
    assert find_latest(folder) == folder / "step-00000002"  # beside a current one


def test_corrupt_version_1_is_found(folder: Path) -> None:
    path = folder / "step-00000001"
    as_version_1(path, sealed=True)
    file, manifest = path / "rank-00001.safetensors", path / "manifest.json"
    data, text = bytearray(file.read_bytes()), manifest.read_text()
    data[-1] ^= 1
    file.write_bytes(data)
    assert verify_checksums(path) == (
        "rank-00001.safetensors: changed since it was written (checksum differs)"
    )
    manifest.write_text(text.replace('"optimizer_step": 7', '"optimizer_step": 8'))
    with pytest.raises(CheckpointError, match="manifest.json: changed since it was written"):
        read_manifest(path)
    as_version_1(folder / "step-00000002", sealed=False)
    manifest = folder / "step-00000002" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"sha256"', '"sha"'))
    with pytest.raises(CheckpointError, match=r"files\[0\].checksum: missing"):
        read_manifest(manifest.parent)


@pytest.mark.parametrize("version", [0, "1", [1], None])
def test_unknown_version_is_refused_by_number(folder: Path, version: Any) -> None:
    path = folder / "step-00000001" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"format_version": version}
    path.write_text(json.dumps(seal(manifest)))
    with pytest.raises(CheckpointError, match="expected 2; read it with the") as raised:
        read_manifest(path.parent)
    assert f"format version {version}" in str(raised.value)


def test_versions_are_migrated_in_sequence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "step-00000001"
    as_version_1(path, sealed=False)
    monkeypatch.setattr("hg_scale.checkpoint.manifest.CHECKPOINT_VERSION", 3)

    def double(older: dict[str, Any]) -> dict[str, Any]:
        assert older["format_version"] == 2
        return {**older, "format_version": 3, "optimizer_step": 2 * older["optimizer_step"]}

    monkeypatch.setitem(MIGRATIONS, 2, double)
    assert read_manifest(path)["optimizer_step"] == 14


def test_manifest_without_a_checksum_of_itself_is_refused(folder: Path) -> None:
    path = folder / "step-00000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["manifest_checksum"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="changed since it was written"):
        read_manifest(path.parent)


def without(*keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("progress"), "progress: missing"),
        (without("progress", "position"), r"progress.position: missing"),
        (without("config", "model"), "config.model: missing"),
        (without("files", 1, "bytes"), r"files\[1\].bytes: missing"),
        (without("files", 0, "fragments", 1, "count"), r"files\[0\].fragments\[1\].count: missing"),
        (lambda m: m.update(step="1"), 'step: expected a valid integer, found "1"'),
        (lambda m: m.update(step=3), "step: expected 2 as the folder is named, found 3"),
        (lambda m: m["progress"].update(step=1), "progress.step: expected 2, found 1"),
        (lambda m: m.update(optimizer_step=-1), "optimizer_step: expected greater than or equal"),
        (lambda m: m["files"][0].update(name="../other/file"), r"files\[0\].name: .* same folder"),
        (lambda m: m["files"][0].update(name="a\0b"), r"files\[0\].name: NUL"),
        (lambda m: m["files"][1].update(name=m["files"][0]["name"]), "files: .* is listed twice"),
        (lambda m: m.update(tokenizer="x"), "tokenizer.*: expected .*found"),
        (lambda m: m["config"].update(data="x"), "config.data: expected .*found"),
        (lambda m: m["config"].update(data={"sources": [5]}), r"config.data.sources\[0\]"),
        (lambda m: m["layout"].update(tensor=None), "layout.tensor: expected .* found null"),
        (lambda m: m.update(guard={"losses": [{}]}), r"guard.losses\[0\]: expected"),
    ],
)
def test_invalid_manifest_is_refused_in_one_line(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    """Its checksum is right, so another tool wrote it, or a person. The message names the key."""
    path = folder / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(seal(manifest)))
    with pytest.raises(CheckpointError, match=rf"manifest.json: {message}.*") as raised:
        read_manifest(path.parent)
    assert "\n" not in str(raised.value)
    assert find_latest(folder) == folder / "step-00000001"


def test_checkpoint_known_to_be_corrupt_is_skipped(folder: Path) -> None:
    newest, lines = folder / "step-00000002", []
    assert find_latest(folder, lines.append, {newest: "rotten"}) == folder / "step-00000001"
    assert lines == [f"skipping {newest}: rotten"]


def test_ranks_divide_the_files_to_verify(folder: Path) -> None:
    path = folder / "step-00000002"
    flip(path / "rank-00001.safetensors")
    assert verify_checksums(path, 0, 2) is None
    assert "rank-00001.safetensors: changed since" in str(verify_checksums(path, 1, 2))
    assert verify_checksums(path, 2, 3) is None  # more ranks than files
    remove_file(path)
    assert verify_checksums(path, 1, 2) == "rank-00001.safetensors is missing"


def flip(file: Path) -> None:
    """Change one bit near the end."""
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def test_folder_without_a_complete_checkpoint_is_refused(folder: Path) -> None:
    remove_file(folder / "step-00000001")
    remove_manifest(folder / "step-00000002")
    lines: list[str] = []
    with pytest.raises(CheckpointError) as caught:
        find_latest(folder, lines.append)
    message = str(caught.value)
    assert message.startswith(f"{folder}: none of the checkpoints is complete (the newest, step")
    assert "the save was never finished" in message and "another run folder" in message
    assert "\n" not in message and lines == []


def test_leftovers_and_other_names_are_ignored(folder: Path) -> None:
    shutil.move(folder / "step-00000002", folder / ".step-00000002.tmp")
    (folder / "latest").write_text("")
    (folder / "step-best").mkdir()
    lines: list[str] = []
    assert find_latest(folder, lines.append) == folder / "step-00000001"
    assert lines == []
    assert find_latest(folder / "nowhere") is None


def test_verify_finds_a_flipped_byte(folder: Path) -> None:
    path = folder / "step-00000002"
    flip(path / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match="rank-00000.safetensors: changed since"):
        verify(path)


def test_verify_finds_numbers_that_are_not_finite(worlds: Worlds, folder: Path) -> None:
    worlds.run(2, write, folder, 3, "nan")
    with pytest.raises(CheckpointError, match="fp32 of head.weight is not finite"):
        verify(folder / "step-00000003")


def test_verify_finds_missing_elements(folder: Path) -> None:
    path = folder / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][1]["fragments"][0]["length"] = 4
    path.write_text(json.dumps(seal(manifest)))
    with pytest.raises(CheckpointError, match="rank-00001.safetensors: has no 0.fp32 of 4"):
        verify(path.parent)


def corrupt_header(path: Path) -> None:
    (path / "rank-00001.safetensors").write_bytes(b"\xff" * 64)


def rename_tensor(path: Path) -> None:
    data = (path / "rank-00001.safetensors").read_bytes()
    (path / "rank-00001.safetensors").write_bytes(data.replace(b'"1.fp32"', b'"9.fp32"'))


def extend_offsets(path: Path) -> None:
    data = (path / "rank-00001.safetensors").read_bytes()
    assert b"[20,48]" in data
    (path / "rank-00001.safetensors").write_bytes(data.replace(b"[20,48]", b"[20,99]"))


def shift_offsets(path: Path) -> None:
    data = (path / "rank-00001.safetensors").read_bytes()
    (path / "rank-00001.safetensors").write_bytes(data.replace(b"[20,48]", b"[220,248]"))


@pytest.mark.parametrize("corrupt", [corrupt_header, rename_tensor, extend_offsets, shift_offsets])
def test_corrupt_header_of_a_file_is_refused(folder: Path, corrupt: Callable[[Path], None]) -> None:
    path = folder / "step-00000002"
    corrupt(path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][1]["bytes"] = (path / "rank-00001.safetensors").stat().st_size
    (path / "manifest.json").write_text(json.dumps(seal(manifest)))
    with pytest.raises(CheckpointError, match=r"rank-00001.safetensors|head.weight"):
        CheckpointReader(path).full_tensor("head.weight")


def test_other_shape_and_other_name_are_refused(written: Path) -> None:
    reader = CheckpointReader(written / "step-00000002")
    with pytest.raises(CheckpointError, match=r"head.weight has shape \(4, 6\), the model needs"):
        reader.read("fp32", Fragment(Slice("head.weight", (6, 4)), 0, 24))
    with pytest.raises(CheckpointError, match="tail.weight: the checkpoint has 0 of the 24"):
        reader.read("fp32", Fragment(Slice("tail.weight", (4, 6)), 0, 24))
