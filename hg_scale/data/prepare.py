"""From a source of bytes to a folder of shards with an index: what prepare_bytes.py does.

The folder has no index.json until every shard is whole. Until then `index.json.partial` marks it
as ours, so that an interrupted preparation can be started over and nothing else is overwritten.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from hg_scale import __version__
from hg_scale.data.errors import DataError
from hg_scale.data.index import INDEX_FILE, SPLITS, Index, read_index
from hg_scale.data.shards import PARTIAL, SplitWriter, write_durably
from hg_scale.data.sources import file_digest, find_files, read_blocks, text_length
from hg_scale.data.tokenizer import ByteTokenizer

# track("what", total in bytes or None) begins a stage and returns what counts its bytes.
Track = Callable[[str, int | None], Callable[[int], None]]

_SMALL, _LARGE = 2**20, 2**26  # tokens of a shard by default, in small and in huge corpora
_SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}\.tar({re.escape(PARTIAL)})?")


@dataclass(frozen=True)
class Preparation:
    """What to prepare; see `data_prep/prepare_bytes.py --help` for each value."""

    input: Path
    output: Path
    split: tuple[float, ...] | tuple[int, ...] = (0.9, 0.05, 0.05)  # train, validation, test
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    chunk_tokens: int = 65536
    shard_tokens: int | None = None  # None: `default_shard_tokens`
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.input.is_file() or self.input.is_dir()):
            raise DataError(f"--input {self.input}: no such file or folder")
        if self.output.exists() and not self.output.is_dir():
            raise DataError(f"--output {self.output}: a file is there; name a folder")
        if self.output.resolve().is_relative_to(self.input.resolve()):
            raise DataError(f"--output {self.output}: lies inside --input; choose another folder")
        if self.by_size and self.input.is_dir():
            raise DataError(
                "--split in bytes is for a single file; a folder is split by whole files: "
                "give fractions such as 0.9,0.05,0.05"
            )
        if not self.input.is_dir() and (self.include != ("*",) or self.exclude):
            raise DataError(f"--include and --exclude are for a folder; {self.input} is a file")

    @property
    def by_size(self) -> bool:
        """Whether `split` gives bytes, not fractions."""
        return all(isinstance(part, int) for part in self.split)


@dataclass(frozen=True)
class _Plan:
    """Where every byte goes, known before anything is written."""

    source: dict[str, Any]  # of the index
    tokenizer: ByteTokenizer
    text_bytes: int
    tokens: dict[str, int]  # by split
    blocks: Callable[[], Iterator[tuple[str, bytes | None]]]  # (split, text); None ends a document


def prepare_bytes(job: Preparation, track: Track | None = None) -> tuple[Index, bool]:
    """Prepare a corpus. The index, and whether anything had to be written.

    Raises DataError, one line, where the source cannot be read or the output holds something else.
    """
    track = track or (lambda what, total: lambda count: None)
    source = _describe(job, track)
    if (job.output / INDEX_FILE).exists():
        return _already_there(job, source), False
    plan = (_plan_folder if job.input.is_dir() else _plan_file)(job, source)
    if not plan.text_bytes:
        raise DataError(f"--input {job.input}: there is no text in it")
    _begin(job.output, source)

    writers = {
        name: SplitWriter(
            job.output,
            name,
            plan.tokenizer,
            chunk_tokens=job.chunk_tokens,
            shard_tokens=job.shard_tokens or default_shard_tokens(tokens, job.chunk_tokens),
        )
        for name, tokens in plan.tokens.items()
    }
    advance = track("writing shards", plan.text_bytes)
    for name, text in plan.blocks():
        if text is None:
            writers[name].write(np.array([plan.tokenizer.eod]))
        else:
            writers[name].write(plan.tokenizer.encode(text))
            advance(len(text))
    index = Index(
        tool_version=f"hg_scale {__version__}",
        tokenizer=plan.tokenizer.identity,
        chunk_tokens=job.chunk_tokens,
        source=source,
        splits={name: writer.close() for name, writer in writers.items()},
    )
    _check_lengths(job, plan, index)
    write_durably(job.output / INDEX_FILE, index.text())
    return read_index(job.output), True


def default_shard_tokens(tokens: int, chunk_tokens: int) -> int:
    """Tokens of a shard where none are given.

    Shards of equal size, their number a multiple of 16 (the canonical streams): of about 1 Mi
    tokens in a small corpus, 256 growing ones in a larger one, more where they would pass 64 Mi;
    fewer than 16 only where a shard would be less than a chunk.
    """
    wanted = max(min(tokens // _SMALL, 256), -(-tokens // _LARGE))
    wanted = max(16, -(-wanted // 16) * 16)
    return max(1, -(-tokens // max(1, min(wanted, tokens // chunk_tokens))))


def split_of(document: str, fractions: tuple[float, ...], seed: int) -> str:
    """The split of a document, by a hash of its name: other documents do not change it."""
    key = f"{seed}:{document}".encode("utf-8", "surrogateescape")
    place = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
    for name, bound in zip(SPLITS, accumulate(fractions), strict=True):
        if place < bound:
            return name
    return [name for name, part in zip(SPLITS, fractions, strict=True) if part][-1]


def _describe(job: Preparation, track: Track) -> dict[str, Any]:
    """The source and the arguments, as far as they decide what is written."""
    source: dict[str, Any] = {"name": job.input.resolve().name}
    if job.input.is_dir():
        files = find_files(job.input, job.include, job.exclude)
        sizes = [(job.input / file).stat().st_size for file in files]
        advance, digest = track("reading", sum(sizes)), hashlib.sha256()
        for file, size in zip(files, sizes, strict=True):
            line = f"{file_digest(job.input / file)} {file}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
            advance(size)
        source |= {"kind": "folder", "files": len(files), "sha256": digest.hexdigest()}
        source |= {"include": list(job.include), "exclude": list(job.exclude), "seed": job.seed}
    else:
        source |= {"kind": "file", "sha256": file_digest(job.input)}
    source |= {"split": list(job.split), "chunk_tokens": job.chunk_tokens}
    return source | {"shard_tokens": job.shard_tokens}


def _plan_file(job: Preparation, source: dict[str, Any]) -> _Plan:
    """One text without documents, cut by position."""
    if job.by_size:
        sizes = [int(part) for part in job.split]
    else:
        total = text_length(job.input)
        bounds = [round(total * part) for part in accumulate(job.split)][:-1] + [total]
        sizes = [bound - before for before, bound in zip([0, *bounds], bounds, strict=False)]

    def blocks() -> Iterator[tuple[str, bytes | None]]:
        text = read_blocks(job.input)
        block = b""
        for name, left in zip(SPLITS, sizes, strict=True):
            while left and (block := block or next(text, b"")):
                yield name, block[:left]
                left, block = left - len(block[:left]), block[left:]

    tokens = dict(zip(SPLITS, sizes, strict=True))
    return _Plan(source, ByteTokenizer(documents=False), sum(sizes), tokens, blocks)


def _plan_folder(job: Preparation, source: dict[str, Any]) -> _Plan:
    """A document a file, whole in one split; empty files are left out."""
    lengths = {
        file: text_length(job.input / file)
        for file in find_files(job.input, job.include, job.exclude)
    }
    splits = {file: split_of(file, job.split, job.seed) for file in lengths if lengths[file]}
    tokens = Counter(dict.fromkeys(SPLITS, 0))
    for file, name in splits.items():
        tokens[name] += lengths[file] + 1

    def blocks() -> Iterator[tuple[str, bytes | None]]:
        for file, name in splits.items():
            for text in read_blocks(job.input / file):
                yield name, text
            yield name, None

    tokenizer = ByteTokenizer(documents=True)
    return _Plan(source, tokenizer, sum(lengths.values()), dict(tokens), blocks)


def _already_there(job: Preparation, source: dict[str, Any]) -> Index:
    """The index in the output folder, if it is the one that this job would write."""
    index = read_index(job.output)
    # Through JSON, as the index has been.
    theirs, ours = index.source, json.loads(json.dumps(source))
    different = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if different:
        raise DataError(
            f"--output {job.output}: holds data prepared from {theirs.get('name')!r} with another "
            f"{', '.join(different)}; choose another folder or remove that one"
        )
    for split in index.splits.values():
        for shard in split.shards:
            path = job.output / shard.file
            if not path.exists() or path.stat().st_size != shard.file_bytes:
                raise DataError(
                    f"{path}: missing or not {shard.file_bytes} bytes long, as the index says; "
                    "remove the folder and prepare the data again"
                )
    return index


def _begin(folder: Path, source: dict[str, Any]) -> None:
    """Mark the folder as ours, and clear what an interrupted preparation left in it."""
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / (INDEX_FILE + PARTIAL)
    left = [path for path in folder.iterdir() if path != marker]
    foreign = [path.name for path in left if not _SHARD_NAME.fullmatch(path.name)]
    if foreign or (left and not marker.exists()):
        raise DataError(
            f"--output {folder}: not empty ({min(foreign or [left[0].name])!r} is there) and no "
            "interrupted preparation; choose an empty or new folder"
        )
    marker.write_text(json.dumps(source) + "\n", encoding="utf-8")
    for path in left:
        with suppress(FileNotFoundError):
            path.unlink()


def _check_lengths(job: Preparation, plan: _Plan, index: Index) -> None:
    """The source must have had what the plan counted on."""
    written = {name: split.tokens for name, split in index.splits.items()}
    if written != plan.tokens:
        found = sum(split.text_bytes for split in index.splits.values())
        raise DataError(
            f"--input {job.input}: has {found} bytes of text, expected {plan.text_bytes}; "
            + ("correct --split" if job.by_size else "it changed meanwhile: start again")
        )
