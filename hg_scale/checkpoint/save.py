"""Writing: each rank its own file, then a manifest, last.

The folder is made under a temporary name and renamed when every rank has confirmed what it wrote,
so a crash at any moment leaves the older checkpoints and no half one. A rank that fails (a full
disk) tells the others: all give this save up together.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from hg_scale.atomic_write import sync_path, write_durable
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.find import MANIFEST, folder_name
from hg_scale.checkpoint.fragments import Fragment, cover_problems
from hg_scale.checkpoint.rank_file import LocalState, Staged, gather, write_rank_file
from hg_scale.checkpoint.retention import Keep, prune, remove_leftovers
from hg_scale.checkpoint.versions import CHECKPOINT_VERSION, seal
from hg_scale.errors import UserError

_T = TypeVar("_T")
Group = dist.ProcessGroup | None


def save(
    folder: Path,
    step: int,
    states: Iterable[LocalState],
    meta: dict[str, Any],
    names: Collection[str] = (),
) -> Path:
    """Write a checkpoint of `step` from all ranks; `meta` goes into the manifest as it stands.

    `states` are those fragments that this rank is to write. Raises CheckpointError on every rank
    where one of them failed; older checkpoints are left as they are.
    """
    return write_checkpoint(folder, step, lambda: gather(states), meta, names=names)


def write_checkpoint(
    folder: Path,
    step: int,
    staged: Callable[[], Staged],
    meta: dict[str, Any],
    group: Group = None,
    keep: Keep = Keep(),  # noqa: B008  # frozen
    damaged: Collection[Path] = (),
    warn: Callable[[str], None] = lambda _: None,
    permit: Callable[[], None] = lambda: None,
    names: Collection[str] = (),
) -> Path:
    """As `save`, over a process group of all ranks.

    `staged` gives what this rank writes, or raises what kept it; `permit` raises on rank 0 what
    forbids to write to the folder at all. `names` are the parameters that all ranks together have
    to write. Once the checkpoint is there, `latest` names it and what it supersedes is removed
    (`retention.prune`); rank 0 warns where these fail.
    """
    rank = dist.get_rank()
    final = folder / folder_name(step)
    temporary = folder / f".{final.name}.tmp"

    def prepare() -> None:
        if rank == 0:
            permit()
            remove_leftovers(folder)
            new = not folder.exists()
            temporary.mkdir(parents=True)
            if new:
                _sync_parents(folder)

    def write() -> dict[str, Any]:
        return write_rank_file(temporary / f"rank-{rank:05}.safetensors", staged())

    def commit() -> None:
        if rank == 0:
            _write_manifest(temporary, step, entries, meta, names)
            _put_in_place(temporary, final)

    try:
        _agree(prepare, "prepare the folder", group)
        entry = _agree(write, "write its file", group)
        entries: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(entry, entries if rank == 0 else None, group=group)
        _agree(commit, "finish the manifest", group)
    except CheckpointError:
        if rank == 0:  # every rank is through with it
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if rank == 0:
        try:
            # Durable before what the older `latest` named may go.
            write_durable(folder / "latest", final.name + "\n")
        except OSError as error:  # what it names must stay, too
            warn(f"{folder / 'latest'} does not name {final.name}: {error.strerror}")
        else:
            for fault in prune(folder, step, keep, damaged):
                warn(fault)
    return final


def _agree(work: Callable[[], _T], what: str, group: Group) -> _T:
    """Do something on each rank; where any fails, all raise, naming it."""
    result, fault = None, None
    try:
        result = work()
    except OSError as error:
        fault = (error.strerror or str(error)) + (f" ({error.filename})" if error.filename else "")
    except UserError as error:
        fault = str(error)
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    faults: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault, group=group)
    for rank, message in enumerate(faults):
        if message:
            raise CheckpointError(f"not saved: rank {rank} could not {what}: {message}")
    return result  # type: ignore[return-value]


def _write_manifest(
    folder: Path,
    step: int,
    files: list[dict[str, Any]],
    meta: dict[str, Any],
    names: Collection[str] = (),
) -> None:
    fragments = [Fragment.from_json(f) for file in files for f in file["fragments"]]
    missing = sorted(set(names) - {fragment.slice.name for fragment in fragments})
    problems = [f"{name}: no rank wrote it" for name in missing] + cover_problems(fragments)
    if problems:
        raise ValueError(f"parameters are not written whole and once: {'; '.join(problems[:3])}")
    manifest = {"format_version": CHECKPOINT_VERSION, "step": step, **meta, "files": files}
    write_durable(folder / MANIFEST, json.dumps(seal(manifest)))


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename the folder; one of this step goes only then.

    There is one where it was damaged and passed over. `latest` is not left to name it meanwhile.
    """
    older = final.with_name(f".{final.name}.old")
    if final.exists():
        latest = final.parent / "latest"
        with suppress(OSError):
            if latest.read_text().strip() == final.name:
                latest.unlink()
        shutil.rmtree(older, ignore_errors=True)
        os.rename(final, older)
    try:
        os.rename(temporary, final)
    except OSError:
        with suppress(OSError):  # else what is left is removed by the next save
            os.rename(older, final)
        raise
    sync_path(final.parent)
    shutil.rmtree(older, ignore_errors=True)


def _sync_parents(folder: Path) -> None:
    """Make a new folder durable, and the run folder around it, which may be as new."""
    for parent in folder.absolute().parents[:3]:
        with suppress(OSError):  # one that may not be read
            sync_path(parent)
