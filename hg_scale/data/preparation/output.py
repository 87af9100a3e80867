"""The output folder of a preparation: which job it belongs to, and whether that is finished.

index.json is written after every shard is complete. Until then the folder `preparing/` marks the
output as unfinished, so that an interrupted preparation can resume and no other file is ever
overwritten.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from hg_scale.atomic_write import PARTIAL, sync_path, write_durable
from hg_scale.data.errors import DataError
from hg_scale.data.index import INDEX_FILE, SPLITS, Index, read_index
from hg_scale.data.preparation.skipping import SKIPPED_FILE
from hg_scale.data.tokenizer import MODEL_FILE, SentencePieceTokenizer, Tokenizer

WORK = "preparing"
TEXT, SHARDS = "text", "shards"  # its folders: output of the first pass, records of the second
_JOB = "job.json"
_OURS = re.compile(
    rf"(({'|'.join(SPLITS)})-\d{{5,}}\.tar|{MODEL_FILE}|{INDEX_FILE}|{SKIPPED_FILE})(\.\w+{re.escape(PARTIAL)})?"
)


def check_output(folder: Path, inputs: tuple[Path, ...]) -> None:
    """Raise DataError where the folder contains something that no preparation wrote."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--output {folder}: is a file; choose a folder")
    for source in inputs:
        if not (source.is_file() or source.is_dir()):
            raise DataError(f"--input {source}: no such file or folder")
        if folder.resolve().is_relative_to(source.resolve()):
            raise DataError(f"--output {folder}: is inside --input; choose another folder")
    if not folder.exists() or (folder / INDEX_FILE).exists():
        return
    names = sorted(path.name for path in folder.iterdir() if path.name != WORK)
    foreign = [name for name in names if not _OURS.fullmatch(name)]
    if foreign or (names and not (folder / WORK).is_dir()):
        raise DataError(
            f"--output {folder}: not empty (it contains {(foreign or names)[0]!r}) and not an "
            "interrupted preparation; choose an empty or new folder"
        )


def already_prepared(folder: Path, job: dict[str, Any]) -> Index:
    """Return the finished index in the folder, if it is the one that this job would write.

    Raises DataError where it is of another job or a shard is missing.
    """
    index = read_index(folder)
    finished = job_identity(index.source, index.tokenizer.model_dump())
    if different := _differences(finished, job):
        raise DataError(
            f"--output {folder}: contains data prepared from {index.source.get('name')!r} with "
            f"another {different}; choose another folder or remove that one"
        )
    for split in index.splits.values():
        for shard in split.shards:
            path = folder / shard.file
            if not path.exists() or path.stat().st_size != shard.file_bytes:
                raise DataError(
                    f"{path}: missing or not {shard.file_bytes} bytes long, as the index says; "
                    "remove the folder and prepare the data again"
                )
    return index


def begin_output(folder: Path, job: dict[str, Any], *, resumable: bool) -> None:
    """Write the description of the job; the caller holds the lock of the folder.

    Removes the files of an interrupted run, unless it was the same job and that is `resumable`.
    Raises DataError where it was another job that has finished part of its work.
    """
    path, different = folder / WORK / _JOB, ""
    if path.exists():
        old = json.loads(path.read_text())
        different = _differences(old, job)
        if different and old.get("goes_on") and is_started(folder):
            raise DataError(
                f"--output {folder}: an interrupted preparation there has another {different}; "
                "use the same input and options to finish it, or remove the folder to start over"
            )
    for name in folder.iterdir():
        if name.is_file() and (different or not resumable or name.name.endswith(PARTIAL)):
            name.unlink(missing_ok=True)
    if different:
        for part in (TEXT, SHARDS):
            shutil.rmtree(folder / WORK / part, ignore_errors=True)
    write_durable(path, json.dumps({**job, "goes_on": resumable}) + "\n")


def is_started(folder: Path) -> bool:
    """Return whether an unfinished preparation has read documents or written a shard."""
    texts = (folder / WORK / TEXT).glob("*.text")
    return any(path.stat().st_size for path in texts) or any(folder.glob("*.tar"))


def discard_output(folder: Path) -> None:
    """Remove everything after a user's error, if nothing was done yet."""
    if not is_started(folder):
        clear_work(folder)
        with suppress(OSError):  # not empty
            folder.rmdir()


def finish_output(folder: Path, index: Index, tokenizer: Tokenizer) -> Index:
    """Write the tokenizer's model, then the index, which marks the output as finished."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        write_durable(folder / MODEL_FILE, tokenizer.model)
    sync_path(folder)  # the names of the shards, before that of the index
    write_durable(folder / INDEX_FILE, index.text())
    return read_index(folder)


def clear_work(folder: Path) -> None:
    """Remove the files that only the preparation needed."""
    shutil.rmtree(folder / WORK, ignore_errors=True)


def job_identity(source: dict[str, Any], tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Return what is equal for two runs of the same preparation, as it reads back from JSON."""
    return json.loads(json.dumps({**source, "tokenizer": tokenizer}))


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    keys = [key for key in {**new, **old} if key != "goes_on" and old.get(key) != new.get(key)]
    return ", ".join(keys)
