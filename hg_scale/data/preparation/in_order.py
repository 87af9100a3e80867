"""Prepare shards of bytes in the order of the source, in one process, for prepare_bytes.py."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from hg_scale import __version__
from hg_scale.data.errors import DataError
from hg_scale.data.index import INDEX_FILE, SPLITS, Index
from hg_scale.data.preparation import output
from hg_scale.data.preparation.corpus import SourceFile, split_of
from hg_scale.data.preparation.rank_group import RankGroup
from hg_scale.data.preparation.shard_writer import SplitWriter, default_shard_tokens
from hg_scale.data.preparation.skipping import (
    SKIPPED_FILE,
    SkipLog,
    SkipPolicy,
    read_list,
)
from hg_scale.data.preparation.source_summary import SourceSummary, survey_files
from hg_scale.data.preparation.sources import (
    file_digest,
    read_blocks,
    text_length,
)
from hg_scale.data.progress import ProgressBar
from hg_scale.data.tokenizer import ByteTokenizer
from hg_scale.parallel.launch import Launch


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
    as_they_are: bool = False  # read files of every kind, without decompressing them
    policy: SkipPolicy = SkipPolicy()
    log: SkipLog = field(init=False)  # files that cannot be read
    summary: SourceSummary = field(init=False)  # of the other files

    def __post_init__(self) -> None:
        object.__setattr__(self, "log", SkipLog(self.policy))
        object.__setattr__(self, "summary", SourceSummary())
        output.check_output(self.output, (self.input,))
        if self.by_size and self.input.is_dir():
            raise DataError(
                "--split in bytes is for a single file; for a folder, where each file is in one "
                "split, set it to fractions such as 0.9,0.05,0.05"
            )
        if not self.input.is_dir() and (self.include != ("*",) or self.exclude):
            raise DataError(f"--include and --exclude are for a folder; {self.input} is a file")

    @property
    def by_size(self) -> bool:
        """Whether `split` is in bytes, not fractions."""
        return all(isinstance(part, int) for part in self.split)


@dataclass(frozen=True)
class _Plan:
    """The split of every byte, known before anything is written."""

    source: dict[str, Any]  # of the index
    tokenizer: ByteTokenizer
    text_bytes: int
    tokens: dict[str, int]  # per split
    blocks: Callable[[], Iterator[tuple[str, bytes | None]]]  # (split, text); None ends a document


def prepare_bytes(job: Preparation, progress: ProgressBar | None = None) -> tuple[Index, bool]:
    """Prepare a corpus. Returns the index, and whether anything had to be written.

    Raises DataError where the source cannot be read, or the output contains something else or has
    another writer.
    """
    progress = progress or ProgressBar()
    files = survey_files(
        [job.input], job.include, job.exclude, job.summary, job.log, only_text=True,
        as_they_are=job.as_they_are,
    )  # fmt: skip
    source, files = _describe(job, files, progress)
    if (job.output / INDEX_FILE).exists():
        index = output.already_prepared(job.output, _job_of(job, source))
        for item in read_list(job.output / SKIPPED_FILE):
            job.log.add(item)
        job.log.check()
        output.clear_work(job.output)
        return index, False
    is_folder = job.input.is_dir()
    plan = _plan_folder(job, files, source, progress) if is_folder else _plan_file(job, source)
    if not plan.text_bytes:
        raise DataError(f"--input {job.input}: contains no text")
    work = job.output / output.WORK
    work.mkdir(parents=True, exist_ok=True)
    with RankGroup(Launch(), work, patience=60.0, progress=progress) as group:
        output.begin_output(job.output, _job_of(job, source), resumable=False)
        index = _write(job, plan, group)
        job.log.write_list(job.output / SKIPPED_FILE)
        index = output.finish_output(job.output, index, plan.tokenizer)
    output.clear_work(job.output)
    return index, True


def _write(job: Preparation, plan: _Plan, group: RankGroup) -> Index:
    """Write the shards. Returns the index."""
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
    group.start_stage("writing shards", plan.text_bytes, 0)
    for name, text in plan.blocks():
        if text is None:
            writers[name].write(np.array([plan.tokenizer.eod]))
        else:
            writers[name].write(plan.tokenizer.encode(text))
            group.advance(len(text))
    index = Index(
        tool_version=f"hg_scale {__version__}",
        tokenizer=plan.tokenizer.identity,
        chunk_tokens=job.chunk_tokens,
        source=plan.source,
        splits={name: writer.close() for name, writer in writers.items()},
    )
    _check_lengths(job, plan, index)
    return index


def _job_of(job: Preparation, source: dict[str, Any]) -> dict[str, Any]:
    tokenizer = ByteTokenizer(documents=job.input.is_dir())
    return output.job_identity(source, tokenizer.identity.model_dump())


def _describe(
    job: Preparation, files: list[SourceFile], progress: ProgressBar
) -> tuple[dict[str, Any], list[SourceFile]]:
    """Return the source and the options that determine the shards, and the readable files."""
    source: dict[str, Any] = {"name": job.input.resolve().name}
    readable = []
    if job.input.is_dir():
        progress.begin("reading", sum(file.size for file in files))
        digest = hashlib.sha256()
        for file in files:
            try:
                line = f"{file_digest(Path(file.path))} {file.name}\n"
            except DataError as error:
                job.log.skip(file.path, "file", None, error)
                continue
            digest.update(line.encode("utf-8", "surrogateescape"))
            readable.append(file)
            progress.advance(file.size)
        source |= {"kind": "folder", "files": len(readable), "sha256": digest.hexdigest()}
        source |= {"include": list(job.include), "exclude": list(job.exclude), "seed": job.seed}
        source["split by"] = "content"
        if left_out := job.summary.left_out.by_default():
            source["left out"] = left_out
    else:
        source |= {"kind": "file", "sha256": file_digest(job.input)}
    if job.as_they_are:
        source["bytes as they are"] = True
    source |= {"split": list(job.split), "chunk_tokens": job.chunk_tokens}
    return source | {"shard_tokens": job.shard_tokens}, readable


def _plan_file(job: Preparation, source: dict[str, Any]) -> _Plan:
    """Plan one text without documents, split by position."""
    if job.by_size:
        sizes = [int(part) for part in job.split]
    else:
        total = text_length(job.input, as_it_is=job.as_they_are)
        bounds = [round(total * part) for part in accumulate(job.split)][:-1] + [total]
        sizes = [bound - before for before, bound in zip([0, *bounds], bounds, strict=False)]

    def blocks() -> Iterator[tuple[str, bytes | None]]:
        text = read_blocks(job.input, as_it_is=job.as_they_are)
        block = b""
        for name, left in zip(SPLITS, sizes, strict=True):
            while left and (block := block or next(text, b"")):
                yield name, block[:left]
                left, block = left - len(block[:left]), block[left:]

    tokens = dict(zip(SPLITS, sizes, strict=True))
    return _Plan(source, ByteTokenizer(documents=False), sum(sizes), tokens, blocks)


def _plan_folder(
    job: Preparation, files: list[SourceFile], source: dict[str, Any], progress: ProgressBar
) -> _Plan:
    """Plan a folder: each file is a document, and in one split; empty files are left out."""

    def read(file: SourceFile) -> Iterator[bytes]:
        return read_blocks(Path(file.path), as_it_is=job.as_they_are)

    lengths = _text_lengths(job, files)
    tokens = Counter(dict.fromkeys(SPLITS, 0))
    splits: dict[SourceFile, str] = {}
    progress.begin("splitting", sum(lengths.values()))
    for file in filter(lengths.get, lengths):
        splits[file] = split_of(read(file), job.split, job.seed)
        progress.advance(lengths[file])
    for file, name in splits.items():
        tokens[name] += lengths[file] + 1

    def blocks() -> Iterator[tuple[str, bytes | None]]:
        for file, name in splits.items():
            for text in read(file):
                yield name, text
            yield name, None

    tokenizer = ByteTokenizer(documents=True)
    return _Plan(source, tokenizer, sum(lengths.values()), dict(tokens), blocks)


def _text_lengths(job: Preparation, files: list[SourceFile]) -> dict[SourceFile, int]:
    """Return the bytes of text of each file that can be read."""
    lengths = {}
    for file in files:
        try:
            lengths[file] = text_length(Path(file.path), as_it_is=job.as_they_are)
        except DataError as error:
            job.log.skip(file.path, "file", None, error)
    return lengths


def _check_lengths(job: Preparation, plan: _Plan, index: Index) -> None:
    """Raise DataError where the source did not have the text that the plan counted on."""
    written = {name: split.tokens for name, split in index.splits.items()}
    if written != plan.tokens:
        size = sum(split.text_bytes for split in index.splits.values())
        raise DataError(
            f"--input {job.input}: has {size} bytes of text, expected {plan.text_bytes}; "
            + ("correct --split" if job.by_size else "it changed meanwhile: start again")
        )
