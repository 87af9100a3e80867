"""Write a checkpoint: each rank its own file, then rank 0 the manifest.

The folder has a temporary name until every rank has confirmed its file, and is then renamed. A
crash at any moment leaves the older checkpoints and no partial one. If a rank fails (a full disk),
all ranks abandon the save together.
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
from hg_scale.bounded_read import RECORD_BYTES, FormatError, read_text
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.find import folder_name
from hg_scale.checkpoint.fragments import Fragment, coverage_problems
from hg_scale.checkpoint.manifest import CHECKPOINT_VERSION, MANIFEST, seal
from hg_scale.checkpoint.rank_file import LocalState, Staged, stage, write_rank_file
from hg_scale.checkpoint.retention import RetentionPolicy, prune, remove_leftovers
from hg_scale.errors import UserError

_T = TypeVar("_T")
Group = dist.ProcessGroup | None


def save_checkpoint(
    folder: Path,
    step: int,
    states: Iterable[LocalState],
    meta: dict[str, Any],
    names: Collection[str] = (),
) -> Path:
    """Write the checkpoint of `step` from all ranks. A collective.

    states: the fragments that this rank writes; meta: further keys of the manifest; names: see
    `write_checkpoint`. Raises CheckpointError on every rank if one of them fails; older checkpoints
    are left as they are.
    """
    return write_checkpoint(folder, step, lambda: stage(states), meta, names=names)


def write_checkpoint(
    folder: Path,
    step: int,
    staged: Callable[[], Staged],
    meta: dict[str, Any],
    group: Group = None,
    retention: RetentionPolicy = RetentionPolicy(),  # noqa: B008  # frozen
    corrupt: Collection[Path] = (),
    warn: Callable[[str], None] = lambda _: None,
    permit: Callable[[], None] = lambda: None,
    names: Collection[str] = (),
) -> Path:
    """As `save_checkpoint`, over a process group of all ranks, with retention.

    staged: returns what this rank writes, or raises why it cannot. permit: called on rank 0 before
    anything is written; raises if the folder may not be written to. names: the parameters that all
    ranks together must have written. Once the checkpoint is renamed into place, `latest` names it
    and older ones are removed (`retention.prune`, with `corrupt`); rank 0 warns if these fail.
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
            _rename_into_place(temporary, final)

    try:
        _run_on_all_ranks(prepare, "prepare the folder", group)
        entry = _run_on_all_ranks(write, "write its file", group)
        entries: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(entry, entries if rank == 0 else None, group=group)
        _run_on_all_ranks(commit, "finish the manifest", group)
    except CheckpointError:
        if rank == 0:  # no rank writes to it any more
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if rank == 0:
        try:
            # Durable before the checkpoint that the older `latest` names is removed.
            write_durable(folder / "latest", final.name + "\n")
        except OSError as error:  # nothing is removed: `latest` may still name an older one
            warn(f"{folder / 'latest'} does not name {final.name}: {error.strerror}")
        else:
            for problem in prune(folder, step, retention, corrupt):
                warn(problem)
    return final


def _run_on_all_ranks(work: Callable[[], _T], what: str, group: Group) -> _T:
    """Run `work` on each rank; if it fails on any, raise CheckpointError naming it on all.

    Unlike `training.agreement` it gathers the messages, over the group of the writing threads.
    """
    result, error_line = None, None
    try:
        result = work()
    except OSError as error:
        error_line = error.strerror or str(error)
        error_line += f" ({error.filename})" if error.filename else ""
    except UserError as error:
        error_line = str(error)
    except Exception as error:
        error_line = f"{type(error).__name__}: {error}"
    error_lines: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(error_lines, error_line, group=group)
    for rank, message in enumerate(error_lines):
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
    problems = [f"{name}: no rank wrote it" for name in missing] + coverage_problems(fragments)
    if problems:
        raise ValueError(f"not every element was written exactly once: {'; '.join(problems[:3])}")
    manifest = {"format_version": CHECKPOINT_VERSION, "step": step, **meta, "files": files}
    write_durable(folder / MANIFEST, json.dumps(seal(manifest)))


def _rename_into_place(temporary: Path, final: Path) -> None:
    """Rename the folder, replacing a corrupt checkpoint of the same step.

    `latest` is removed first if it names that step, so that it never names a missing checkpoint.
    """
    older = final.with_name(f".{final.name}.old")
    if final.exists():
        latest = final.parent / "latest"
        with suppress(OSError, FormatError):
            if read_text(latest, RECORD_BYTES).strip() == final.name:
                latest.unlink()
        shutil.rmtree(older, ignore_errors=True)
        os.rename(final, older)
    try:
        os.rename(temporary, final)
    except OSError:
        with suppress(OSError):  # if this fails too, the next save removes it
            os.rename(older, final)
        raise
    sync_path(final.parent)
    shutil.rmtree(older, ignore_errors=True)


def _sync_parents(folder: Path) -> None:
    """Make a new folder durable, and the run folder around it, which may be new as well."""
    for parent in folder.absolute().parents[:3]:
        with suppress(OSError):  # a parent that may not be read
            sync_path(parent)
