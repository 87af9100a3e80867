"""From a corpus to shuffled shards: by many processes, in bounded memory, to be gone on with.

Two passes. The first reads the source, gives every document a key and spills it, sorted
(`spill.py`): a task at a time. Then the whole is known and cut into ranges of keys of equal
size. The second makes a shard of each range. Tasks and shards are done in any order by any
process, and what is done is seen by its last file; the bytes depend on the corpus and the
options alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hg_scale import __version__
from hg_scale.data.errors import DataError
from hg_scale.data.index import INDEX_FILE, SPLITS, Index, Shard
from hg_scale.data.preparation import output
from hg_scale.data.preparation.corpus import KEY_BITS, DocumentSource, ReadTask
from hg_scale.data.preparation.place import Place
from hg_scale.data.preparation.shard_writer import (
    PARTIAL,
    ShardWriter,
    default_shard_tokens,
    make_split,
    shard_name,
    write_durably,
)
from hg_scale.data.preparation.spill import Spill, SpillWriter, table_path
from hg_scale.data.preparation.team import Team
from hg_scale.data.progress import ProgressBar

CHUNK_TOKENS = 65536
_BIN_BITS = 20  # of a key: where the shards may be cut
_SAMPLE = 1 << 20  # bytes of text whose tokens are counted to choose the number of shards


@dataclass(frozen=True)
class Job:
    """What to prepare, where to, and with whom."""

    corpus: DocumentSource
    inputs: tuple[Path, ...]
    output: Path
    chunk_tokens: int = CHUNK_TOKENS
    shard_tokens: int | None = None  # about so many; None: `default_shard_tokens`
    place: Place = Place()
    patience: float = 120.0

    @property
    def member_tokens(self) -> int:
        """Tokens of a tar member: `chunk_tokens`, or whole documents where all are as long."""
        document = self.corpus.document_tokens or 1
        return max(1, self.chunk_tokens // document) * document

    def description(self) -> dict[str, Any]:
        """What decides the shards."""
        return self.corpus.source() | {
            "chunk_tokens": self.chunk_tokens, "shard_tokens": self.shard_tokens,
        }  # fmt: skip


class Range(NamedTuple):
    """A shard to be made: the documents with keys in [low, high)."""

    split: str
    number: int
    low: int
    high: int

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number)


def prepare(job: Job, progress: ProgressBar) -> tuple[Index | None, bool]:
    """Prepare a corpus, together with the other processes of `job.place`.

    The index (on rank 0) and whether anything had to be written. Raises DataError, one line, where
    the source cannot be read, the output holds something else, or another process failed.
    """
    output.check_output(job.output, job.inputs)
    if (job.output / INDEX_FILE).exists():
        return (_already_there(job) if job.place.rank == 0 else None), False
    work = job.output / output.WORK
    work.mkdir(parents=True, exist_ok=True)
    mistaken = False
    try:
        with Team(job.place, work, patience=job.patience, progress=progress) as team:
            try:
                index = _prepare(job, work, team)
            except DataError as error:
                mistaken = error is not team.problem
                raise
    finally:
        # With others, who still look there for what went wrong, the next start clears it.
        if mistaken and job.place.size == 1:
            output.abandon(job.output)
    if team.rank == 0:
        output.clear_work(job.output)
    return index, True


def _prepare(job: Job, work: Path, team: Team) -> Index | None:
    """All of it, as one of the team. The index on rank 0."""
    if team.rank == 0:
        _begin(job, work)
    team.barrier()
    job.corpus.adopt(json.loads((work / "survey.json").read_text()))
    tasks = job.corpus.tasks()
    _scatter(job, work, tasks, team)
    team.barrier()
    spill = Spill(work / output.TEXT, len(tasks))
    if team.rank == 0 and not (work / "plan.json").exists():
        write_durably(work / "plan.json", json.dumps(_plan(job, spill)))
    team.barrier()
    plan = json.loads((work / "plan.json").read_text())
    ranges = [Range(*entry) for entry in plan["ranges"]]
    _gather(job, work, ranges, plan["text_bytes"], spill, team)
    team.barrier()
    return _finish(job, work, ranges) if team.rank == 0 else None


def _already_there(job: Job) -> Index:
    job.corpus.adopt(job.corpus.survey())
    identity = job.corpus.tokenizer.identity.model_dump()
    index = output.already_prepared(job.output, output.job_of(job.description(), identity))
    output.clear_work(job.output)  # of a run that was killed when all was done
    return index


def _begin(job: Job, work: Path) -> None:
    """Rank 0: see what there is to do."""
    survey = job.corpus.survey()
    job.corpus.adopt(survey)
    identity = job.corpus.tokenizer.identity.model_dump()
    output.begin(job.output, output.job_of(job.description(), identity), goes_on=True)
    for folder in (output.TEXT, output.SHARDS):
        (work / folder).mkdir(exist_ok=True)
        for partial in (work / folder).glob(f"*{PARTIAL}"):  # of a process that was killed
            partial.unlink()
    write_durably(work / "survey.json", json.dumps(survey))


def _scatter(job: Job, work: Path, tasks: list[ReadTask], team: Team) -> None:
    """The first pass."""
    folder = work / output.TEXT
    done = {task.number for task in tasks if table_path(folder, task.number).exists()}
    total = sum(task.stored_bytes for task in tasks)
    before = sum(task.stored_bytes for task in tasks if task.number in done)
    team.stage("reading documents", total, before)
    left = [task for task in tasks if task.number not in done]
    for task in team.share(left, lambda task: f"text-{task.number}"):
        try:
            _scatter_task(job, folder, task, team)
        except DataError as error:
            if error is team.problem or not output.something_done(job.output):
                raise
            raise DataError(
                f"{error}. A part is done in {job.output}: remove it, to start over once the input "
                "or the options have changed"
            ) from None


def _scatter_task(job: Job, folder: Path, task: ReadTask, team: Team) -> None:
    with SpillWriter(folder, task.number) as spill:
        for segment in task.segments:
            counter = _Counter(team, segment.end - segment.begin)
            for key, content in job.corpus.documents(segment, folder, counter.advance):
                spill.add(key, content)
            counter.close()


class _Counter:
    """Counts the stored bytes of a segment, all of them and no more."""

    def __init__(self, team: Team, size: int) -> None:
        self._team, self._left = team, size

    def advance(self, count: int) -> None:
        count = min(count, self._left)
        self._left -= count
        self._team.advance(count)

    def close(self) -> None:
        self.advance(self._left)


def _plan(job: Job, spill: Spill) -> dict[str, Any]:
    """Cut the documents into shards."""
    size, number = spill.count(_BIN_BITS)
    total = int(size.sum())
    if not total:
        names = ", ".join(str(path) for path in job.inputs)
        raise DataError(f"--input {names}: there is nothing in it")
    per_byte = _tokens_per_byte(job, spill, size)
    each = 1 << (KEY_BITS - 64 + _BIN_BITS)  # bins of a split
    shift = 64 - _BIN_BITS
    ranges: list[Range] = []
    for code, name in enumerate(SPLITS):
        here = slice(code * each, (code + 1) * each)
        ends = int(number[here].sum()) if job.corpus.tokenizer.eod is not None else 0
        tokens = round(int(size[here].sum()) * per_byte) + ends
        if not tokens:
            continue
        wanted = job.shard_tokens or default_shard_tokens(tokens, job.member_tokens)
        for low, high in _cut(size[here], -(-tokens // wanted)):
            base, count = code * each, len([r for r in ranges if r.split == name])
            ranges.append(Range(name, count, (base + low) << shift, (base + high) << shift))
    return {"text_bytes": total, "ranges": ranges}


def _cut(size: NDArray[np.int64], parts: int) -> list[tuple[int, int]]:
    """Cut bins with these sizes into at most `parts` spans of about equal size, none empty."""
    sums = np.cumsum(size)
    targets = sums[-1] * np.arange(1, parts) / parts
    found = np.unique(np.searchsorted(sums, targets) + 1).tolist()
    ends = [end for end in found if sums[end - 1] < sums[-1]]
    return list(zip([0, *ends], [*ends, len(size)], strict=True))


def _tokens_per_byte(job: Job, spill: Spill, size: NDArray[np.int64]) -> float:
    """From the documents with the lowest keys, which are drawn at random."""
    sums = np.cumsum(size)
    stop = int(np.searchsorted(sums, _SAMPLE)) + 1
    tokens = text = 0
    for content in spill.documents(0, min(stop, len(size) - 1) << (64 - _BIN_BITS)):
        tokens += len(job.corpus.tokenizer.encode(bytes(content)))
        text += len(content)
    return tokens / text


def _gather(
    job: Job, work: Path, ranges: list[Range], total: int, spill: Spill, team: Team
) -> None:
    """The second pass."""
    done = {shard.file: shard.text_bytes for shard in _records(job, work, ranges)}
    team.stage("writing shards", total, sum(done.values()))
    left = [part for part in ranges if part.name not in done]
    for part in team.share(left, lambda part: part.name):
        shard = _write_shard(job, part, spill, team)
        write_durably(_record_path(work, part), shard.model_dump_json())


def _write_shard(job: Job, part: Range, spill: Spill, team: Team) -> Shard:
    tokenizer = job.corpus.tokenizer
    end = None if tokenizer.eod is None else np.array([tokenizer.eod])
    writer = ShardWriter(job.output / part.name, tokenizer, chunk_tokens=job.member_tokens)
    text = 0
    try:
        for content in spill.documents(part.low, part.high):
            writer.write(tokenizer.encode(content))
            if end is not None:
                writer.write(end)
            text += len(content)
            team.advance(len(content))
        return writer.close(text)
    except BaseException:
        writer.abandon()
        raise


def _record_path(work: Path, part: Range) -> Path:
    """What the index will say of a shard; it is there when the shard is done."""
    return work / output.SHARDS / f"{part.name}.json"


def _records(job: Job, work: Path, ranges: list[Range]) -> Iterator[Shard]:
    """The shards that are done."""
    for part in ranges:
        path = _record_path(work, part)
        if path.exists():
            shard = Shard.model_validate_json(path.read_bytes())
            tar = job.output / shard.file
            if tar.exists() and tar.stat().st_size == shard.file_bytes:
                yield shard


def _finish(job: Job, work: Path, ranges: list[Range]) -> Index:
    """Rank 0: write the index."""
    shards: dict[str, list[Shard]] = {name: [] for name in SPLITS}
    for part, shard in zip(ranges, _records(job, work, ranges), strict=True):
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
    return output.finish(job.output, index, corpus.tokenizer)
