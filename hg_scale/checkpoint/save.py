"""Writing: each rank its own file, then a manifest, last.

The folder is made under a temporary name and renamed when every rank has confirmed what it wrote,
so a crash at any moment leaves the older checkpoints and no half one. A rank that fails (a full
disk) tells the others: all give this save up together.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from hg_scale.checkpoint.deepspeed_state import LocalState
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.find import FORMAT_VERSION, MANIFEST, folder_name
from hg_scale.checkpoint.fragments import Fragment, cover_problems


def save(folder: Path, step: int, states: Iterable[LocalState], meta: dict[str, Any]) -> Path:
    """Write a checkpoint of `step` from all ranks; `meta` goes into the manifest as it stands.

    `states` are those fragments that this rank is to write. Raises CheckpointError on every rank
    where one of them failed; older checkpoints are left as they are.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    final = folder / folder_name(step)
    temporary = folder / f".{final.name}.tmp"
    try:
        _agree(lambda: _fresh(temporary) if rank == 0 else None, "prepare the folder")
        entry = _agree(lambda: _write_rank(temporary, rank, states), "write its file")
        entries: list[Any] = [None] * world
        dist.all_gather_object(entries, entry)

        def commit() -> None:
            if rank == 0:
                _write_manifest(temporary, step, entries, meta)
                _put_in_place(temporary, final)
                _replace(folder / "latest", final.name + "\n")

        _agree(commit, "finish the manifest")
    except CheckpointError:
        if rank == 0:  # every rank is through with it
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _agree(work: Any, what: str) -> Any:
    """Do something on each rank; where any fails, all raise, naming it."""
    result, fault = None, None
    try:
        result = work()
    except OSError as error:
        fault = f"{error.strerror or error} ({error.filename})" if error.filename else str(error)
    except Exception as error:  # safetensors wraps a full disk in an error of its own
        fault = f"{type(error).__name__}: {error}"
    faults: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    for rank, message in enumerate(faults):
        if message:
            raise CheckpointError(f"not saved: rank {rank} could not {what}: {message}")
    return result


def _fresh(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _write_rank(folder: Path, rank: int, states: Iterable[LocalState]) -> dict[str, Any]:
    """This rank's file, and its entry in the manifest."""
    tensors: dict[str, torch.Tensor] = {}
    fragments = []
    for number, local in enumerate(states):
        fragments.append(local.fragment.to_json())
        for kind, tensor in local.tensors.items():
            # A copy: a view would make safetensors write the storage around it.
            tensors[f"{number}.{kind}"] = tensor.detach().to("cpu", torch.float32).clone()
    name = f"rank-{rank:05}.safetensors"
    path = folder / name
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "name": name,
        "bytes": path.stat().st_size,
        "sha256": digest,
        "fragments": fragments,
    }


def _write_manifest(
    folder: Path, step: int, files: list[dict[str, Any]], meta: dict[str, Any]
) -> None:
    problems = cover_problems(Fragment.from_json(f) for file in files for f in file["fragments"])
    if problems:
        raise ValueError(f"parameters are not written whole and once: {'; '.join(problems[:3])}")
    manifest = {"format_version": FORMAT_VERSION, "step": step, **meta, "files": files}
    _replace(folder / MANIFEST, json.dumps(manifest))
    _sync_folder(folder)


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename the folder; one of this step, by a run that died after it, goes only then."""
    older = temporary.with_suffix(".old")
    if final.exists():
        shutil.rmtree(older, ignore_errors=True)
        os.rename(final, older)
    os.rename(temporary, final)
    _sync_folder(final.parent)
    shutil.rmtree(older, ignore_errors=True)


def _replace(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
