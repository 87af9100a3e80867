"""Training a sentencepiece model on a sample of a corpus.

Our models keep every text: the identity normaliser, no space put in front or taken away, and byte
pieces for what the vocabulary lacks.
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
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Literal

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.corpus import File, Segment, list_files, make_tasks
from hg_scale.data.preparation.documents import PIECE_BYTES, TextFormat, file_kind, read_pieces
from hg_scale.data.preparation.shard_writer import write_durably
from hg_scale.data.preparation.sources import is_packed
from hg_scale.data.progress import ProgressBar
from hg_scale.data.tokenizer import SentencePieceTokenizer

END_PIECE = "<|end_of_document|>"

_PASSAGE = 2048  # bytes of what is drawn into the sample, up to the end of a line
_LONGEST = 8192
_READ = 16  # how many times the sample is read at most, to draw it from
_THREADS = 16  # whatever the machine: sums in another order give another model


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

    def __post_init__(self) -> None:
        for path in self.inputs:
            if not (path.is_file() or path.is_dir()):
                raise DataError(f"--input {path}: no such file or folder")
        if self.output.exists():
            raise DataError(f"--output {self.output}: is there already; choose another name")
        if not self.output.absolute().parent.is_dir():
            raise DataError(f"--output {self.output}: there is no folder {self.output.parent}")


@dataclass(frozen=True)
class TrainedTokenizer:
    """What came of it."""

    tokenizer: SentencePieceTokenizer
    sample_bytes: int
    sample_tokens: int


def train_tokenizer(job: TokenizerTraining, progress: ProgressBar) -> TrainedTokenizer:
    """Train a model and write it. The same input, options and sentencepiece give the same model.

    Raises DataError, one line, where the input cannot be read or does not suit the options.
    """
    with tempfile.TemporaryDirectory() as folder:
        sample, count = Path(folder, "sample"), 0
        progress.begin("drawing a sample", job.sample_bytes)
        with sample.open("w", encoding="utf-8") as file:
            for passage in _draw(job, Path(folder)):
                file.write(json.dumps(passage) + "\n")
                count += len(passage.encode())
                progress.advance(len(passage.encode()))
        if not count:
            raise DataError(f"--input {job.inputs[0]}: there is no text in it")
        progress.begin("training", None)
        model = _train_apart(job, sample, progress)
        tokenizer = SentencePieceTokenizer(model, documents=True)
        tokens = sum(len(tokenizer.encode(passage)) for passage in _passages_of(sample))
    write_durably(job.output, model)
    return TrainedTokenizer(tokenizer, count, tokens)


def _draw(job: TokenizerTraining, scratch: Path) -> Iterator[str]:
    """Passages of the corpus, drawn by the seed, up to the size of the sample.

    Parts of files are visited in a drawn order, and of each passage in them it is drawn whether
    it is taken; so a large corpus need not be read whole.
    """
    files = list_files(job.inputs, job.include, job.exclude)
    wanted = job.sample_bytes / max(sum(file.size for file in files), 1)
    share = min(max(wanted, 1 / _READ), 1.0)

    def can_split(file: File) -> bool:
        path = Path(file.path)
        return not is_packed(path) if _is_one_text(job, file) else job.format.can_split(path)

    tasks = make_tasks(files, can_split, PIECE_BYTES)
    segments = [segment for task in tasks for segment in task.segments]
    segments.sort(key=lambda s: _drawn(job.seed, files[s.file].name, s.begin))
    left = job.sample_bytes
    for segment in segments:
        file = files[segment.file]
        for place, text in _texts(job, file, segment, scratch):
            for number, passage in enumerate(_passages(text)):
                if _drawn(job.seed, file.name, place, number) < share:
                    decoded = passage.decode(errors="ignore").replace("\0", "")
                    if decoded:
                        yield decoded
                        left -= len(decoded.encode())
                if left <= 0:
                    return


def _is_one_text(job: TokenizerTraining, file: File) -> bool:
    return file_kind(Path(file.path)) == "text" and job.format.separator is None


def _texts(
    job: TokenizerTraining, file: File, segment: Segment, scratch: Path
) -> Iterator[tuple[int, bytes]]:
    path, span = Path(file.path), (segment.begin, segment.end)
    if _is_one_text(job, file):  # of any length: not held whole
        return read_pieces(path, *span, [], _ignore)
    return job.format.documents(path, *span, scratch, _ignore)


def _ignore(_: int) -> None:
    pass


def _passages(text: bytes) -> Iterator[bytes]:
    """Cut at the ends of lines where it can be."""
    start = 0
    while start < len(text):
        stop = text.find(b"\n", start + _PASSAGE, start + _LONGEST) + 1 or start + _LONGEST
        yield text[start:stop]
        start = stop


def _drawn(seed: int, *key: object) -> float:
    """A number in [0, 1) drawn for the key."""
    name = repr((seed, *key)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") / 2**64


def _passages_of(sample: Path) -> Iterator[str]:
    with sample.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _train_apart(job: TokenizerTraining, sample: Path, progress: ProgressBar) -> bytes:
    """Train in a process of its own, whose log on stderr tells how far it is."""
    context = multiprocessing.get_context("spawn")
    log, log_end = context.Pipe(duplex=False)
    result, result_end = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(job, sample, log_end, result_end), daemon=True)
    process.start()
    log_end.close()
    result_end.close()
    lines = b""
    # The log ends after the result, which does not fit into a pipe at once: both have to be read.
    while result not in wait([log, result]) and (block := os.read(log.fileno(), 4096)):
        lines = (lines + block)[-4096:]
        if told := _stage_of(lines.decode(errors="replace")):
            progress.describe(f"training: {told}")
    try:
        model, problem = result.recv()
    except EOFError:
        raise DataError(
            "sentencepiece ended before it was done: it may lack memory, take fewer --sample-bytes"
        ) from None
    finally:
        process.join()
    if model is None:
        raise DataError(_explain(problem, job))
    return model


def _train(job: TokenizerTraining, sample: Path, log: Connection, result: Connection) -> None:
    """In the other process."""
    os.dup2(log.fileno(), 2)
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_passages_of(sample),
            model_writer=model,
            model_type=job.model,
            vocab_size=job.vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2 * _LONGEST,
            num_threads=_THREADS,
            unk_id=0,
            eos_id=1,
            eos_piece=END_PIECE,
            bos_id=-1,
            pad_id=-1,
        )
        result.send((model.getvalue(), ""))
    except (RuntimeError, OSError) as error:
        result.send((None, str(error)))


def _stage_of(log: str) -> str:
    """The last thing that sentencepiece's log says, in a few words."""
    found = re.findall(
        r"(Loading sentence|Making suffix array|Extracting frequent sub strings|EM sub_iter=\d+ "
        r"size=\d+|Added: freq=\d+ size=\d+)", log
    )  # fmt: skip
    return found[-1].replace("_", " ").replace("=", " ") if found else ""


def _explain(problem: str, job: TokenizerTraining) -> str:
    """What sentencepiece refused, in terms of the options."""
    if most := re.search(r"too high.*<= (\d+)", problem, re.S):
        return (
            f"--vocab-size {job.vocab_size}: the sample gives at most {most[1]} pieces; choose "
            "fewer, or give more text"
        )
    if least := re.search(r"required_chars.*?(\d+) vs (\d+)", problem, re.S):
        return (
            f"--vocab-size {job.vocab_size}: bytes and frequent characters alone take {least[2]} "
            "pieces; choose more"
        )
    return f"sentencepiece refused: {' '.join(problem.split())}"
