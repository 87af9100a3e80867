"""Text prepared from enwik8 (in the shared folder) decodes to enwik8."""

from __future__ import annotations

import hashlib
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hg_scale.config.constants import IGNORED_LABEL
from hg_scale.data.evaluation import evaluation_batches, split_text
from hg_scale.data.index import read_index
from hg_scale.data.inspection import shard_problems, tokenizer_line
from hg_scale.data.shards import SplitReader
from tests.shared import ROOT, shared

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SPLITS = {
    "train": "f8978bd9ca51fbea387d5145d310652ab39904bcbc8ab2647932c8c2e0539e64",
    "validation": "16b8b889f05ebeb5684d497d49383e8e55eb3634cee2f9a023dcab68cbf64f17",
    "test": "86f62c0adeb6c27763f308b8913bec743626421a4d2b4010f1e177a40eef7750",
}
PART = 4_000_000  # bytes
SEPARATOR = b"  </page>\n"


def run(script: str, *options: object) -> None:
    command = [sys.executable, str(ROOT / "data_prep" / script), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first megabytes."""
    path = tmp_path_factory.mktemp("enwik8") / "part.txt"
    with lzma.open(shared("data/enwik8.xz")) as file:
        path.write_bytes(file.read(PART))
    return path


@pytest.fixture(scope="module")
def model(part: Path) -> Path:
    """A unigram tokenizer of 8,000 pieces, trained on it."""
    path = part.with_name("tok.model")
    run("train_tokenizer.py", "--input", part, "--vocab-size", 8000, "--output", path)
    return path


def windows_joined(index, name: str) -> bytes:
    """Return the windows of a split, decoded one by one."""
    tokenizer, texts = index.open_tokenizer(), []
    for _, labels in evaluation_batches(index, name, sequence_length=1000, batch_size=4):
        texts += [tokenizer.decode(row[row != IGNORED_LABEL]) for row in labels]
    return b"".join(texts)


def test_all_of_enwik8_as_bytes(tmp_path):
    run("prepare_bytes.py", "--input", shared("data/enwik8.xz"), "--output", tmp_path / "out",
        "--split", "90000000,5000000,5000000")  # fmt: skip
    index = read_index(tmp_path / "out")
    for name, digest in SPLITS.items():
        assert hashlib.sha256(split_text(index, name)).hexdigest() == digest


def test_one_text_in_8000_pieces(part, model, tmp_path):
    run("prepare_text.py", "--input", part, "--tokenizer", model, "--output", tmp_path / "out",
        "--split", f"{PART - 200_000},100000,100000")  # fmt: skip
    index = read_index(tmp_path / "out")
    assert (index.vocab_size, index.eod) == (8000, None)
    assert b"".join(windows_joined(index, name) for name in index.splits) == part.read_bytes()
    assert [split.text_bytes for split in index.splits.values()] == [PART - 200_000, 10**5, 10**5]
    train = index.splits["train"]
    assert 2.5 < train.text_bytes / train.tokens < 4.5


def test_shuffled_articles_in_8000_pieces(part, model, tmp_path):
    run("prepare_text.py", "--input", part, "--tokenizer", model, "--output", tmp_path / "out",
        "--document-separator", r"  </page>\n")  # fmt: skip
    index = read_index(tmp_path / "out")
    tokenizer, found = index.open_tokenizer(), []
    for name, split in index.splits.items():
        tokens = SplitReader(index, name).read(0, split.tokens)
        parts = np.split(tokens, np.flatnonzero(tokens == index.eod) + 1)
        found += [tokenizer.decode(tokens) for tokens in parts[:-1]]
    expected = part.read_bytes().split(SEPARATOR)
    assert len(expected) > 300 and found != expected
    assert sorted(found) == sorted(filter(None, expected))
    assert tokenizer_line(index).endswith("; lossless")
    shards = [shard for split in index.splits.values() for shard in split.shards]
    assert not any(shard_problems(index, shard, tokenizer) for shard in shards)
