"""Prepare shuffled shards of a corpus: with many ranks, in bounded memory, resumable.

There are two passes. The first reads the source a task at a time, computes a key for every
document and writes the documents sorted by key (`spill.py`). The sizes are then known, and the
keys are cut into ranges of equal size. The second pass writes a shard per range. Any rank does any
task or shard, in any order; each is done once its last file exists. The bytes of the shards depend
only on the corpus and the options.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hg_scale import __version__
from hg_scale.atomic_write import PARTIAL, write_atomic, write_durable
from hg_scale.data.errors import DataError
from hg_scale.data.index import INDEX_FILE, SPLITS, Index, Shard
from hg_scale.data.preparation import output
from hg_scale.data.preparation.corpus import KEY_BITS, Corpus, ReadTask, Segment
from hg_scale.data.preparation.encoding import encode_documents
from hg_scale.data.preparation.rank_group import RankGroup
from hg_scale.data.preparation.shard_writer import (
    ShardWriter,
    default_shard_tokens,
    make_split,
    shard_name,
)
from hg_scale.data.preparation.skipping import (
    SKIPPED_FILE,
    SkipLog,
    SkippingRefused,
    SkipPolicy,
    Unreadable,
    read_list,
)
from hg_scale.data.preparation.spill import Spill, SpillWriter, table_path
from hg_scale.data.progress import ProgressBar
from hg_scale.parallel.launch import Launch

CHUNK_TOKENS = 65536
_BIN_BITS = 20  # high bits of a key by which the shards are cut
_SURVEY_LOG = "survey.log.json"
_SAMPLE_BYTES = 1 << 20  # of text whose tokens are counted to choose the number of shards


@dataclass(frozen=True)
class Job:
    """What to prepare, the output folder, and the ranks that take part."""

    corpus: Corpus
    inputs: tuple[Path, ...]
    output: Path
    chunk_tokens: int = CHUNK_TOKENS
    shard_tokens: int | None = None  # approximately; None: `default_shard_tokens`
    launch: Launch = Launch()
    patience: float = 120.0  # seconds
    policy: SkipPolicy = SkipPolicy()
    log: SkipLog = field(init=False)  # after `prepare`, on rank 0: what was left out

    def __post_init__(self) -> None:
        object.__setattr__(self, "log", SkipLog(self.policy))

    @property
    def member_tokens(self) -> int:
        """Tokens of a tar member: `chunk_tokens`, rounded to documents of equal length."""
        document = self.corpus.document_tokens or 1
        return max(1, self.chunk_tokens // document) * document

    def description(self) -> dict[str, Any]:
        """Return what determines the shards."""
        return self.corpus.source() | {
            "chunk_tokens": self.chunk_tokens, "shard_tokens": self.shard_tokens,
        }  # fmt: skip


class ShardRange(NamedTuple):
    """A shard to write: the documents with keys in [low, high)."""

    split: str
    number: int
    low: int
    high: int

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number)


def prepare(job: Job, progress: ProgressBar) -> tuple[Index | None, bool]:
    """Prepare a corpus together with the other ranks of `job.launch`.

    Returns the index (on rank 0) and whether anything had to be written. Raises DataError where
    the source cannot be read, the output contains something else, or another rank failed.
    """
    output.check_output(job.output, job.inputs)
    if (job.output / INDEX_FILE).exists():
        return (_read_finished(job) if job.launch.rank == 0 else None), False
    work = job.output / output.WORK
    work.mkdir(parents=True, exist_ok=True)
    own_error = False
    try:
        with RankGroup(job.launch, work, patience=job.patience, progress=progress) as group:
            try:
                index = _prepare(job, work, group)
            except DataError as error:
                own_error = error is not group.problem
                raise
    finally:
        # Other ranks still read the error from that folder; with them, the next start clears it.
        if own_error and job.launch.world_size == 1:
            output.discard_output(job.output)
    if group.rank == 0:
        output.clear_work(job.output)
    return index, True


def _prepare(job: Job, work: Path, group: RankGroup) -> Index | None:
    """Run both passes as one of the ranks. Returns the index on rank 0."""
    if group.rank == 0:
        _begin(job, work)
    group.barrier()
    job.corpus.use_survey(json.loads((work / "survey.json").read_text()))
    tasks = job.corpus.tasks()
    _sort_documents(job, work, tasks, group)
    group.barrier()
    if group.rank == 0:
        _collect_skipped(job, work, tasks)
    spill = Spill(work / output.TEXT, len(tasks))
    if group.rank == 0 and not (work / "plan.json").exists():
        write_durable(work / "plan.json", json.dumps(_plan(job, spill)))
    group.barrier()
    plan = json.loads((work / "plan.json").read_text())
    ranges = [ShardRange(*entry) for entry in plan["ranges"]]
    _write_shards(job, work, ranges, plan["text_bytes"], spill, group)
    group.barrier()
    return _finish(job, work, ranges) if group.rank == 0 else None


def _read_finished(job: Job) -> Index:
    for item in read_list(job.output / SKIPPED_FILE):
        job.log.add(item)
    job.log.check()
    job.corpus.use_survey(job.corpus.survey(SkipLog(job.policy)))
    identity = job.corpus.tokenizer.identity.model_dump()
    index = output.already_prepared(job.output, output.job_identity(job.description(), identity))
    output.clear_work(job.output)  # of a run that was killed after it wrote the index
    return index


def _begin(job: Job, work: Path) -> None:
    """Scan the input and start the job; on rank 0."""
    survey = job.corpus.survey(log := SkipLog(job.policy))
    job.corpus.use_survey(survey)
    identity = job.corpus.tokenizer.identity.model_dump()
    output.begin_output(
        job.output, output.job_identity(job.description(), identity), resumable=True
    )
    for folder in (output.TEXT, output.SHARDS):
        (work / folder).mkdir(exist_ok=True)
        for partial in (work / folder).glob(f"*{PARTIAL}"):  # of a process that was killed
            partial.unlink()
    log.write(work / _SURVEY_LOG)
    write_durable(work / "survey.json", json.dumps(survey))


def _sort_documents(job: Job, work: Path, tasks: list[ReadTask], group: RankGroup) -> None:
    """Run the first pass."""
    folder = work / output.TEXT
    spill = Spill(folder, len(tasks))
    done = {task.number for task in tasks if table_path(folder, task.number).exists()}
    total = sum(task.stored_bytes for task in tasks)
    before = sum(task.stored_bytes for task in tasks if task.number in done)
    group.start_stage("reading documents", total, before)
    skipped = 0
    for task in group.claim_items(tasks, lambda task: f"text-{task.number}"):
        if task.number in done and spill.is_intact(task.number):
            continue
        try:
            skipped += _sort_task(job, folder, task, group, skipped)
        except DataError as error:
            if error is group.problem or not output.is_started(job.output):
                raise
            may_change = isinstance(error, SkippingRefused)
            raise (type(error) if may_change else DataError)(
                f"{error}. Part of the work is done in {job.output}: remove that folder to start "
                "over with another input or other options"
                + ("; --on-fault and --max-skipped may change without that" if may_change else "")
            ) from None


def _sort_task(job: Job, folder: Path, task: ReadTask, group: RankGroup, skipped: int) -> int:
    """Sort the documents of a task. Returns how many items were left out of it.

    A segment that turns out to be unreadable after some of its documents is left out entirely: the
    task starts over without it.
    """
    counters = {segment: _Counter(group, segment.end - segment.begin) for segment in task.segments}
    unreadable: dict[Segment, DataError] = {}
    while True:
        log = SkipLog(job.policy, before=skipped)
        try:
            with SpillWriter(folder, task.number) as spill:
                for segment, counter in counters.items():
                    _sort_segment(job, folder, segment, counter, spill, log, unreadable)
                    counter.close()
                log.write(_log_path(folder, task.number))  # first: the table means done
            return len(log.items)
        except Unreadable:
            continue  # `unreadable` contains the segment now


def _sort_segment(
    job: Job,
    folder: Path,
    segment: Segment,
    counter: _Counter,
    spill: SpillWriter,
    log: SkipLog,
    unreadable: dict[Segment, DataError],
) -> None:
    file = job.corpus.files[segment.file]
    begin = segment.begin if segment.end - segment.begin < file.size else None
    if segment in unreadable:
        log.skip_part(file.path, begin, unreadable[segment])
        return
    documents = job.corpus.documents(segment, folder, counter.advance, log)
    try:
        for keys, batch in log.guard(file.path, begin, documents, lambda: counter.problem):
            spill.add(keys, batch)
    except Unreadable as error:
        unreadable[segment] = error.reason
        raise


def _log_path(folder: Path, task: int) -> Path:
    """Return the path of a task's log, which exists if something was left out."""
    return folder / f"{task:05d}.log.json"


def _collect_skipped(job: Job, work: Path, tasks: list[ReadTask]) -> None:
    """Gather what all tasks left out. Raises DataError where that is too much."""
    job.log.read(work / _SURVEY_LOG)
    for task in tasks:
        job.log.read(_log_path(work / output.TEXT, task.number))
    job.log.check()


class _Counter:
    """Counts the stored bytes of a segment, each of them once."""

    def __init__(self, group: RankGroup, size: int) -> None:
        self._group, self._left = group, size

    def advance(self, count: int) -> None:
        count = min(count, self._left)
        self._left -= count
        self._group.advance(count)

    @property
    def problem(self) -> DataError | None:
        """What ends this rank, where it is not an error of its own work."""
        return self._group.problem

    def close(self) -> None:
        self.advance(self._left)


def _plan(job: Job, spill: Spill) -> dict[str, Any]:
    """Return the ranges of keys that become shards, as JSON."""
    size, number = spill.count(_BIN_BITS)
    total = int(size.sum())
    if not total:
        names = ", ".join(str(path) for path in job.inputs)
        raise DataError(f"--input {names}: contains no documents{job.log.summary()}")
    per_byte = _tokens_per_byte(job, spill, size)
    split_bins = 1 << (KEY_BITS - 64 + _BIN_BITS)
    shift = 64 - _BIN_BITS
    ranges: list[ShardRange] = []
    for code, name in enumerate(SPLITS):
        base = code * split_bins
        bins = slice(base, base + split_bins)
        ends = int(number[bins].sum()) if job.corpus.tokenizer.eod is not None else 0
        tokens = round(int(size[bins].sum()) * per_byte) + ends
        if not tokens:
            continue
        shard_tokens = job.shard_tokens or default_shard_tokens(tokens, job.member_tokens)
        spans = _cut(size[bins], -(-tokens // shard_tokens))
        for count, (low, high) in enumerate(spans):
            ranges.append(ShardRange(name, count, (base + low) << shift, (base + high) << shift))
    return {"text_bytes": total, "ranges": ranges}


def _cut(size: NDArray[np.int64], parts: int) -> list[tuple[int, int]]:
    """Cut bins with these sizes into at most `parts` spans of about equal size, none empty."""
    sums = np.cumsum(size)
    targets = sums[-1] * np.arange(1, parts) / parts
    candidates = np.unique(np.searchsorted(sums, targets) + 1).tolist()
    ends = [end for end in candidates if sums[end - 1] < sums[-1]]
    return list(zip([0, *ends], [*ends, len(size)], strict=True))


def _tokens_per_byte(job: Job, spill: Spill, size: NDArray[np.int64]) -> float:
    """Return the ratio of the documents with the lowest keys, a random sample."""
    sums = np.cumsum(size)
    stop = int(np.searchsorted(sums, _SAMPLE_BYTES)) + 1
    tokenizer, tokens, text = job.corpus.tokenizer, 0, 0
    for batch in spill.documents(0, min(stop, len(size) - 1) << (64 - _BIN_BITS)):
        for ids, count in encode_documents(tokenizer, batch):
            tokens += len(ids)
            text += count
        tokens -= len(batch.lengths) * (tokenizer.eod is not None)
    return tokens / text


def _write_shards(
    job: Job, work: Path, ranges: list[ShardRange], total: int, spill: Spill, group: RankGroup
) -> None:
    """Run the second pass."""
    done = {shard.file: shard.text_bytes for shard in _read_records(job, work, ranges)}
    group.start_stage("writing shards", total, sum(done.values()))
    left = [part for part in ranges if part.name not in done]
    for part in group.claim_items(left, lambda part: part.name):
        shard = _write_shard(job, part, spill, group)
        # Not synced: a record that is lost or incomplete costs the work of its shard.
        write_atomic(_record_path(work, part), shard.model_dump_json())


def _write_shard(job: Job, part: ShardRange, spill: Spill, group: RankGroup) -> Shard:
    tokenizer = job.corpus.tokenizer
    writer = ShardWriter(job.output / part.name, tokenizer, chunk_tokens=job.member_tokens)
    text = 0
    try:
        for batch in spill.documents(part.low, part.high):
            continues = tokenizer.eod is None and (part.number > 0 or text > 0)
            for ids, count in encode_documents(tokenizer, batch, continues=continues):
                writer.write(ids)
                text += count
                group.advance(count)
        return writer.close(text)
    except BaseException:
        writer.abandon()
        raise


def _record_path(work: Path, part: ShardRange) -> Path:
    """Return the file with a shard's entry of the index, which exists once the shard is done."""
    return work / output.SHARDS / f"{part.name}.json"


def _read_records(job: Job, work: Path, ranges: list[ShardRange]) -> Iterator[Shard]:
    """Yield the entries of the shards that are done."""
    for part in ranges:
        try:
            shard = Shard.model_validate_json(_record_path(work, part).read_bytes())
        except (FileNotFoundError, ValueError):  # an incomplete one: see `_write_shards`
            continue
        tar = job.output / shard.file
        if tar.exists() and tar.stat().st_size == shard.file_bytes:
            yield shard


def _finish(job: Job, work: Path, ranges: list[ShardRange]) -> Index:
    """Write the index, on rank 0."""
    shards: dict[str, list[Shard]] = {name: [] for name in SPLITS}
    for part, shard in zip(ranges, _read_records(job, work, ranges), strict=True):
        shards[part.split].append(shard)
    corpus = job.corpus
    index = Index(
        tool_version=f"hg_scale {__version__}",
        tokenizer=corpus.tokenizer.identity,
        chunk_tokens=job.member_tokens,
        document_tokens=corpus.document_tokens,
        source=job.description(),
        splits={
            name: make_split(
                shards[name],
                with_documents=corpus.tokenizer.eod is not None,
                document_tokens=corpus.document_tokens,
            )
            for name in SPLITS
        },
    )
    job.log.write_list(job.output / SKIPPED_FILE)
    return output.finish_output(job.output, index, corpus.tokenizer)
