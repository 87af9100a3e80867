"""Small prepared corpora, of a file without documents and of a folder; streams of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hg_scale.data.blocks import make_readers
from hg_scale.data.index import Index
from hg_scale.data.preparation.in_order import Preparation, prepare_bytes
from hg_scale.data.preparation.tokenizer_training import TokenizerTraining, train_tokenizer
from hg_scale.data.progress import ProgressBar
from hg_scale.data.sequence_schedule import DataSchedule, DataSource, DataState
from hg_scale.data.shards import RetryPolicy
from hg_scale.data.stream import TrainingStream

TEXT = np.random.default_rng(0).integers(0, 256, 100_003, np.uint8).tobytes()


def prepare(source: Path, output: Path, **options: object) -> Index:
    """Prepare with small chunks and shards; the sources here are random bytes."""
    settings = {"chunk_tokens": 512, "shard_tokens": 3000, "as_they_are": True} | options
    return prepare_bytes(Preparation(source, output, **settings))[0]  # type: ignore[arg-type]


def schedule(
    *sources: Index | DataSource,
    length: int = 64,
    seed: int = 7,
    state: DataState | None = None,
    position: int = 0,
) -> DataSchedule:
    """The schedule of some corpora; an `Index` has weight 1 and repeats."""
    named = [
        s if isinstance(s, DataSource) else DataSource(f"s{i}", s) for i, s in enumerate(sources)
    ]
    return DataSchedule(named, sequence_length=length, seed=seed, state=state, position=position)


def stream(
    schedule: DataSchedule, workers: int = 0, batch_size: int = 12, **options: Any
) -> TrainingStream:
    """A rank's stream; `workers` processes read for it."""
    readers = options.pop("readers", None) or make_readers(workers, RetryPolicy())
    return TrainingStream(schedule, readers, global_batch_size=batch_size, **options)


def global_batches(
    schedule: DataSchedule, count: int, data_size: int = 1, batch_size: int = 12, **options: Any
) -> NDArray[np.int64]:
    """Global batches (count, batch_size, L + 1), joined from the streams of all ranks."""
    ranks = [
        stream(
            schedule,
            batch_size=batch_size,
            data_rank=rank,
            data_size=data_size,
            batches=count,
            **options,
        )
        for rank in range(data_size)
    ]
    try:
        joined = [np.concatenate([s.next_batch().ids for s in ranks]) for _ in range(count)]
        return np.stack(joined)
    finally:
        for rank in ranks:
            rank.close()


def make_folder(folder: Path, files: int = 120) -> dict[str, bytes]:
    """Write documents of 0 to 2,000 random bytes; return their content by relative path."""
    random = np.random.default_rng(1)
    documents = {}
    for number in range(files):
        name = f"{'abc'[number % 3]}/{number:03d}.txt"
        documents[name] = random.bytes(int(random.integers(0, 2000)) if number else 0)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(documents[name])
    return documents


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "text"
    path.write_bytes(TEXT)
    return path


@pytest.fixture(scope="session")
def index(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """`TEXT`: 31 training shards of 3,000 bytes (the last has 3), 5,000 in the other splits."""
    sizes = (90_003, 5_000, 5_000)
    return prepare(text_file, tmp_path_factory.mktemp("corpus") / "text", split=sizes)


@pytest.fixture
def writable(text_file: Path, tmp_path: Path) -> Index:
    """A corpus that the test may corrupt."""
    return prepare(text_file, tmp_path / "copy", split=(9_000, 3_000, 0))


def prose(words: int, seed: int = 0) -> str:
    """Text of invented words, with lines, indents, and some characters beyond ASCII."""
    random = np.random.default_rng(seed)
    syllables = ["ka", "to", "mi", "ren", "sol", "vé", "u", "st", "ling", "漢", "ion", "qua"]
    vocabulary = ["".join(random.choice(syllables, random.integers(1, 4))) for _ in range(300)]
    ranks = random.zipf(1.3, words) % len(vocabulary)
    gaps = random.choice([" ", " ", " ", " ", ", ", ".\n", "\n\n\t", "  "], words)
    return "".join(
        vocabulary[rank] + gap for rank, gap in zip(ranks.tolist(), gaps.tolist(), strict=True)
    )


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sentencepiece model, trained on `prose` by `train_tokenizer`."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "prose.txt").write_text(prose(20_000))
    job = TokenizerTraining((folder / "prose.txt",), folder / "tok.model", 600, "bpe")
    train_tokenizer(job, ProgressBar())
    return job.output


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: tests kill processes, not machines."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
