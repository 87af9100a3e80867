import lzma
import os
from collections import Counter
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from hg_scale import atomic_write
from hg_scale.data.errors import DataError
from hg_scale.data.evaluation import split_text
from hg_scale.data.preparation import shard_writer
from hg_scale.data.preparation.batches import DocumentBatch
from hg_scale.data.preparation.corpus import KEY_BITS, DocumentKeys, SourceFile, split_of
from hg_scale.data.preparation.in_order import Preparation, prepare_bytes
from hg_scale.data.preparation.shard_writer import default_shard_tokens
from hg_scale.data.shards import SplitReader
from tests.data.conftest import TEXT, make_folder, prepare, prose


def contents(folder):
    """Return the files of a folder, without those in the work folder of a preparation."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_splits_by_size_and_by_fraction(text_file, tmp_path):
    by_size = prepare(text_file, tmp_path / "a", split=(90_000, 5_000, 5_003))
    by_part = prepare(text_file, tmp_path / "b", split=(0.9, 0.05, 0.05))
    assert [s.tokens for s in by_size.splits.values()] == [90_000, 5_000, 5_003]
    assert [s.tokens for s in by_part.splits.values()] == [90_003, 5_000, 5_000]
    for index in (by_size, by_part):
        assert b"".join(split_text(index, name) for name in index.splits) == TEXT
        assert (index.vocab_size, index.eod) == (256, None)


def test_same_input_same_bytes(tmp_path):
    text, packed = tmp_path / "text", tmp_path / "text.xz"
    text.write_text(prose(10_000))
    packed.write_bytes(lzma.compress(text.read_bytes()))
    for name in ("one", "two"):
        prepare(text, tmp_path / name, as_they_are=False)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    unpacked = contents(tmp_path / "one") | {"index.json": b""}
    prepare(packed, tmp_path / "three", as_they_are=False)
    assert contents(tmp_path / "three") | {"index.json": b""} == unpacked


def test_each_document_is_in_one_split(tmp_path):
    documents = make_folder(tmp_path / "in")
    index = prepare(tmp_path / "in", tmp_path / "out", split=(0.6, 0.2, 0.2), seed=3)
    assert (index.vocab_size, index.eod) == (257, 256)
    found = {}
    for name, split in index.splits.items():
        tokens = SplitReader(index, name).read(0, split.tokens)
        assert tokens.dtype == np.uint16 and tokens[-1] == 256
        expected = [
            text for file, text in sorted(documents.items())
            if text and split_of([text], (0.6, 0.2, 0.2), 3) == name
        ]  # fmt: skip
        ends = np.flatnonzero(tokens == 256) + 1
        pieces = [part[:-1].astype(np.uint8).tobytes() for part in np.split(tokens, ends)[:-1]]
        assert pieces == expected
        assert split.documents == len(expected) == len(ends)
        assert split_text(index, name) == b"".join(expected)
        begins = np.cumsum([0] + [shard.tokens for shard in split.shards])
        packed = [s.document_ends() + b for s, b in zip(split.shards, begins[:-1], strict=True)]
        assert np.array_equal(np.concatenate(packed), ends)
        found[name] = len(expected)
    assert found["train"] > found["validation"] > 5


def test_a_new_document_moves_no_other():
    texts = [[b"text", b"%d" % number] for number in range(5000)]
    splits = [split_of(text, (0.9, 0.05, 0.05), 0) for text in texts]
    assert splits == [split_of([b"".join(text)], (0.9, 0.05, 0.05), 0) for text in texts]
    assert abs(splits.count("train") / 5000 - 0.9) < 0.015
    assert splits != [split_of(text, (0.9, 0.05, 0.05), 1) for text in texts]
    assert split_of([b"text"], (0.0, 1.0, 0.0), 0) == "validation"


def test_equal_documents_are_in_the_same_split(tmp_path):
    """Whatever their names, compressed or not, and in the same split as in `prepare_text.py`."""
    (tmp_path / "in").mkdir()
    for number in range(60):
        text = b"the text %d" % (number % 20)
        packed = lzma.compress(text) if number % 2 else text
        (tmp_path / "in" / f"{number}.txt{'.xz' * (number % 2)}").write_bytes(packed)
    split = (0.4, 0.3, 0.3)
    index = prepare(tmp_path / "in", tmp_path / "out", split=split, as_they_are=False)
    keys = DocumentKeys((0.4, 0.3, 0.3), 0)
    for number, (name, split) in enumerate(index.splits.items()):
        texts = Counter(split_text(index, name).split(b"the text ")[1:])
        assert set(texts.values()) == {3} and split.documents == texts.total()
        for text in texts:
            batch = DocumentBatch.single(b"the text " + text)
            (key,) = keys(SourceFile("x", "x", 1, 0), np.array([0]), batch)
            assert int(key) >> KEY_BITS == number


def test_a_second_run_changes_nothing(text_file, tmp_path):
    job = Preparation(text_file, tmp_path / "out", as_they_are=True)
    index, written = prepare_bytes(job)
    assert written
    before = {path: path.stat().st_mtime_ns for path in job.output.iterdir()}
    again, written = prepare_bytes(job)
    assert not written and again == index
    assert before == {path: path.stat().st_mtime_ns for path in job.output.iterdir()}


def test_output_of_another_job_is_refused(text_file, tmp_path):
    out = tmp_path / "out"
    prepare(text_file, out)
    with pytest.raises(DataError, match=r"prepared from 'text' with another split, chunk_tokens"):
        prepare(text_file, out, chunk_tokens=100, split=(1.0, 0.0, 0.0))
    other = tmp_path / "text"
    other.write_bytes(TEXT[1:])
    with pytest.raises(DataError, match="with another sha256; choose another folder"):
        prepare(other, out)
    shard = out / "train-00002.tar"
    os.truncate(shard, 1000)
    with pytest.raises(DataError, match=r"train-00002\.tar: missing or not \d+ bytes long"):
        prepare(text_file, out)


@pytest.mark.parametrize("name", ["notes.txt", "train-00000.tar"])
def test_foreign_files_are_never_touched(text_file, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"mine")
    with pytest.raises(DataError, match=f"not empty \\(it contains '{name}'\\)"):
        prepare(text_file, tmp_path / "out")
    assert contents(tmp_path / "out") == {name: b"mine"}


@pytest.mark.parametrize("shards", [0, 1, 17])
def test_interrupted_and_restarted(text_file, tmp_path, monkeypatch, shards):
    prepare(text_file, tmp_path / "complete")
    original, committed = atomic_write.commit, []

    def failing(partial: IO[bytes], path: Path, **options: bool) -> None:
        if len(committed) == shards:
            raise KeyboardInterrupt
        committed.append(path)
        original(partial, path, **options)

    for module in (atomic_write, shard_writer):
        monkeypatch.setattr(module, "commit", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare(text_file, tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()
    for name, content in contents(tmp_path / "out").items():
        assert not name.endswith(".tar") or content == (tmp_path / "complete" / name).read_bytes()
    monkeypatch.undo()
    (tmp_path / "out" / "train-00999.tar").touch()  # of an earlier run with smaller shards
    prepare(text_file, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "complete")


def test_user_errors_are_reported(text_file, tmp_path):
    folder = tmp_path / "in"
    make_folder(folder, files=2)
    empty = tmp_path / "empty"
    empty.touch()
    cases = [
        ({"input": tmp_path / "absent"}, "absent: no such file"),
        ({"output": text_file}, "is a file; choose a folder"),
        ({"input": folder, "output": folder / "out"}, "is inside --input"),
        ({"input": folder, "split": (5, 5, 5)}, "set it to fractions"),
        ({"include": ("*.py",)}, "are for a folder"),
        ({"split": (100_000, 3, 1)}, "100003 bytes of text, expected 100004; correct --split"),
        ({"input": empty}, "contains no text"),
    ]
    for options, message in cases:
        settings = {"input": text_file, "output": tmp_path / "out", "as_they_are": True} | options
        with pytest.raises(DataError, match=message):
            prepare_bytes(Preparation(**settings))
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize(
    ("tokens", "shards"),
    [
        (1, 1),
        (100_000, 1),
        (700_000, 10),
        (3_000_000, 16),
        (18_000_000, 32),
        (90_000_000, 96),
        (10**9, 256),
        (75 * 10**9, 1120),
    ],
)
def test_default_number_of_shards(tokens, shards):
    size = default_shard_tokens(tokens, 65536)
    assert -(-tokens // size) == shards
    assert size <= 2**26
