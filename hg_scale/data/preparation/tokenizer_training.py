"""Train a sentencepiece model on a sample of a corpus.

The models reproduce every text: the identity normaliser, no space added in front or removed, and
byte pieces for what is not in the vocabulary.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hg_scale.atomic_write import write_durable
from hg_scale.data.errors import DataError
from hg_scale.data.preparation.corpus import (
    Segment,
    SourceFile,
    make_tasks,
)
from hg_scale.data.preparation.documents import PIECE_BYTES, TextFormat, read_pieces
from hg_scale.data.preparation.file_format import format_of
from hg_scale.data.preparation.skipping import SKIPPED_FILE, SkipLog, SkipPolicy, Unreadable
from hg_scale.data.preparation.source_summary import SourceSummary, survey_files
from hg_scale.data.preparation.sources import is_compressed
from hg_scale.data.progress import ProgressBar
from hg_scale.data.tokenizer import SentencePieceTokenizer

END_PIECE = "<|end_of_document|>"

_PASSAGE_BYTES = 2048  # of a passage, which then ends at the end of a line
_MAX_PASSAGE_BYTES = 8192
_MAX_READ_RATIO = 16  # bytes read of the corpus per byte of the sample, at most
_THREADS = 16  # on every machine, as another order of summation gives another model
_LOG_PERIOD = 0.5  # seconds between two readings of the log


@dataclass(frozen=True)
class TokenizerTraining:
    """What to train; see `data_prep/train_tokenizer.py --help` for each value."""

    inputs: tuple[Path, ...]
    output: Path
    vocab_size: int
    model: Literal["unigram", "bpe"] = "unigram"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    format: TextFormat = TextFormat()
    sample_bytes: int = 100_000_000
    seed: int = 0
    policy: SkipPolicy = SkipPolicy()

    @property
    def skipped_list(self) -> Path:
        """Where what was left out is listed, beside the model."""
        return self.output.with_name(f"{self.output.name}.{SKIPPED_FILE}")

    def __post_init__(self) -> None:
        for path in self.inputs:
            if not (path.is_file() or path.is_dir()):
                raise DataError(f"--input {path}: no such file or folder")
        if self.output.exists():
            raise DataError(f"--output {self.output}: already exists; choose another name")
        if not self.output.absolute().parent.is_dir():
            raise DataError(f"--output {self.output}: no such folder {self.output.parent}")


@dataclass(frozen=True)
class TrainedTokenizer:
    """A trained tokenizer and the size of its training sample."""

    tokenizer: SentencePieceTokenizer
    sample_bytes: int
    sample_tokens: int
    log: SkipLog
    source: SourceSummary


def train_tokenizer(job: TokenizerTraining, progress: ProgressBar) -> TrainedTokenizer:
    """Train a model and write it. The same input, options and sentencepiece give the same model.

    Raises DataError where the input cannot be read or does not suit the options.
    """
    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder, "sample")
        unreadable: dict[Segment, DataError] = {}
        while True:
            log, summary = SkipLog(job.policy), SourceSummary()
            try:
                patterns = (job.include, job.exclude)
                files = survey_files(job.inputs, *patterns, summary, log, as_they_are=None)
                count = _write_sample(job, files, sample, progress, log, unreadable)
                break
            except Unreadable:
                continue  # from the start, without the segment that `unreadable` contains now
        if not count:
            raise DataError(f"--input {job.inputs[0]}: contains no text")
        progress.begin("training", None)
        model = _train_in_process(job, Path(folder), progress)
        tokenizer = SentencePieceTokenizer(model, documents=True)
        tokens = sum(len(tokenizer.encode(passage)) for passage in _read_sample(sample))
    log.write_list(job.skipped_list)
    write_durable(job.output, model)
    return TrainedTokenizer(tokenizer, count, tokens, log, summary)


def _write_sample(
    job: TokenizerTraining,
    files: list[SourceFile],
    sample: Path,
    progress: ProgressBar,
    log: SkipLog,
    unreadable: dict[Segment, DataError],
) -> int:
    """Write the sample, a line of JSON per passage. Returns its bytes of text."""
    count = 0
    progress.begin("drawing a sample", job.sample_bytes)
    with sample.open("w", encoding="utf-8") as file:
        for passage in _draw(job, files, sample.parent, log, unreadable):
            file.write(json.dumps(passage) + "\n")
            count += len(passage.encode())
            progress.advance(len(passage.encode()))
    return count


def _draw(
    job: TokenizerTraining,
    files: list[SourceFile],
    scratch: Path,
    log: SkipLog,
    unreadable: dict[Segment, DataError],
) -> Iterator[str]:
    """Yield random passages of the corpus, up to the size of the sample.

    Parts of files are read in a random order, and each passage in them is drawn with a fixed
    probability, so that only a part of a large corpus is read.
    """
    fraction = job.sample_bytes / max(sum(file.size for file in files), 1)
    probability = min(max(fraction, 1 / _MAX_READ_RATIO), 1.0)

    def can_split(file: SourceFile) -> bool:
        path = Path(file.path)
        return not is_compressed(path) if _is_one_text(job, file) else job.format.can_split(path)

    tasks = make_tasks(files, can_split, PIECE_BYTES)
    segments = [segment for task in tasks for segment in task.segments]
    segments.sort(key=lambda s: _uniform(job.seed, files[s.file].name, s.begin))
    left = job.sample_bytes
    for segment in segments:
        file = files[segment.file]
        for position, text in _read_texts(job, file, segment, scratch, log, unreadable):
            for number, passage in enumerate(_cut_passages(text)):
                if _uniform(job.seed, file.name, position, number) < probability:
                    decoded = passage.decode(errors="ignore").replace("\0", "")
                    if decoded:
                        yield decoded
                        left -= len(decoded.encode())
                if left <= 0:
                    return


def _is_one_text(job: TokenizerTraining, file: SourceFile) -> bool:
    return format_of(Path(file.path)) == "text" and job.format.separator is None


def _read_texts(
    job: TokenizerTraining,
    file: SourceFile,
    segment: Segment,
    scratch: Path,
    log: SkipLog,
    unreadable: dict[Segment, DataError],
) -> Iterator[tuple[int, bytes]]:
    path, span = Path(file.path), (segment.begin, segment.end)
    begin = segment.begin if segment.end - segment.begin < file.size else None
    if segment in unreadable:
        log.skip_part(file.path, begin, unreadable[segment])
        return
    if _is_one_text(job, file):  # of any length, perhaps more than fits into memory
        texts = read_pieces(path, *span, [], lambda _: None)
    else:
        texts = job.format.documents(path, *span, scratch, lambda _: None, log)
    try:
        yield from log.guard(file.path, begin, texts)
    except Unreadable as error:
        unreadable[segment] = error.reason
        raise


def _cut_passages(text: bytes) -> Iterator[bytes]:
    """Yield passages that end at the ends of lines where possible."""
    start = 0
    while start < len(text):
        limit = start + _MAX_PASSAGE_BYTES
        stop = text.find(b"\n", start + _PASSAGE_BYTES, limit) + 1 or limit
        yield text[start:stop]
        start = stop


def _uniform(seed: int, *key: object) -> float:
    """Return a number in [0, 1), uniformly distributed over keys."""
    name = repr((seed, *key)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") / 2**64


def _read_sample(sample: Path) -> Iterator[str]:
    with sample.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _train_in_process(job: TokenizerTraining, folder: Path, progress: ProgressBar) -> bytes:
    """Train in a child process, whose log, on its stderr, gives the stage. Returns the model.

    The child is a daemon and no pool: it has to end with this process, and may run out of memory.
    """
    model, error, log = folder / "model", folder / "error", folder / "log"
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=_train, args=(job, folder), daemon=True)
    child.start()
    while child.is_alive():
        child.join(_LOG_PERIOD)
        if log.exists() and (stage := _stage_of(log.read_text(errors="replace"))):
            progress.describe(f"training: {stage}")
    if error.exists():
        raise DataError(_explain(error.read_text(), job))
    if child.exitcode or not model.exists():
        raise DataError(
            "sentencepiece ended early, perhaps out of memory; use fewer --sample-bytes"
        )
    return model.read_bytes()


def _train(job: TokenizerTraining, folder: Path) -> None:
    """Write `model` or `error` to the folder; in the child process."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_read_sample(folder / "sample"),
            model_writer=model,
            model_type=job.model,
            vocab_size=job.vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2 * _MAX_PASSAGE_BYTES,
            num_threads=_THREADS,
            unk_id=0,
            eos_id=1,
            eos_piece=END_PIECE,
            bos_id=-1,
            pad_id=-1,
        )
        (folder / "model").write_bytes(model.getvalue())
    except (RuntimeError, OSError) as error:
        (folder / "error").write_text(str(error))


def _stage_of(log: str) -> str:
    """Return the last stage in sentencepiece's log, in a few words."""
    stages = re.findall(
        r"(Loading sentence|Making suffix array|Extracting frequent sub strings|EM sub_iter=\d+ "
        r"size=\d+|Added: freq=\d+ size=\d+)", log
    )  # fmt: skip
    return stages[-1].replace("_", " ").replace("=", " ") if stages else ""


def _explain(error: str, job: TokenizerTraining) -> str:
    """Describe sentencepiece's error in terms of the options."""
    if most := re.search(r"too high.*<= (\d+)", error, re.S):
        return (
            f"--vocab-size {job.vocab_size}: the sample gives at most {most[1]} pieces; choose "
            "fewer, or add text"
        )
    if least := re.search(r"required_chars.*?(\d+) vs (\d+)", error, re.S):
        return (
            f"--vocab-size {job.vocab_size}: bytes and frequent characters alone take {least[2]} "
            "pieces; choose more"
        )
    return f"sentencepiece failed: {' '.join(error.split())}"
