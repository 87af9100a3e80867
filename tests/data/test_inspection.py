from pathlib import Path

import numpy as np
import pytest

from hg_scale.data.errors import DataError
from hg_scale.data.index import Index, pack_offsets
from hg_scale.data.inspection import (
    END_MARK,
    display_text,
    draw_image,
    draw_samples,
    shard_problems,
    tokenizer_line,
)
from hg_scale.data.tokenizer import ByteTokenizer, SentencePieceTokenizer
from tests.data.conftest import TEXT, make_folder, prepare
from tests.data.preparation.test_shuffled import make_corpus
from tests.data.preparation.test_shuffled import run as prepare_documents
from tests.shared import shared


def problems_of(index):
    tokenizer = index.open_tokenizer()
    shards = [shard for split in index.splits.values() for shard in split.shards]
    return [line for shard in shards for line in shard_problems(index, shard, tokenizer)]


def corrupt(index, file, change):
    path = Path(index.location, file)
    path.write_bytes(change(bytearray(path.read_bytes())))


def flip_bit(position):
    def change(content):
        content[position] ^= 1
        return content

    return change


def with_shard(index, **values):
    """The index with changed values of its first training shard."""
    tree = index.model_dump()
    split = tree["splits"]["train"]
    split["shards"][0] |= values
    for key in ("tokens", "text_bytes"):
        split[key] = sum(shard[key] for shard in split["shards"])
    other = Index(**tree)
    other._location = index.location
    return other


def test_intact_shards_have_no_problems(index, tmp_path, model_file):
    assert problems_of(index) == []
    make_folder(tmp_path / "in")
    assert problems_of(prepare(tmp_path / "in", tmp_path / "out")) == []
    make_corpus(tmp_path / "texts", 60)
    for number, tokenizer in enumerate(
        (ByteTokenizer(documents=True), SentencePieceTokenizer.read(model_file, documents=True))
    ):
        prepared, _ = prepare_documents(tmp_path / "texts", tmp_path / f"{number}", tokenizer)
        assert problems_of(prepared) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_bit(512 + 300), "member 0: the checksum differs"),
        (flip_bit(20), r"cannot be read at member 0 \(bad checksum\)"),  # in its name
        (lambda content: content[:2000], r"cannot be read at member 1.*\(and 4 more\)"),
        (lambda content: content[:-1024], "bytes with sha256"),  # the tar end, after all members
        (lambda content: content + bytes(512), "10752 bytes with sha256.*has 10240"),
        (lambda content: b"", "cannot be read at member 0"),
    ],
)
def test_corrupt_shard_is_reported_in_one_line(writable, change, message):
    corrupt(writable, "train-00001.tar", change)
    (problem,) = problems_of(writable)
    assert "train-00001.tar" in problem and "\n" not in problem
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(problem)


def test_missing_shard_is_reported(writable):
    Path(writable.location, "validation-00000.tar").unlink()
    (problem,) = problems_of(writable)
    assert "validation-00000.tar: the shard is missing" in problem


def test_index_of_other_shards_is_reported(writable, tmp_path):
    """Intact shards with other contents than in the index."""
    wrong = with_shard(writable, text_bytes=2999)
    (problem,) = problems_of(wrong)
    assert "train-00000.tar: its tokens decode to 3000 bytes of text, the index has 2999" in problem
    make_folder(tmp_path / "in")
    index = prepare(tmp_path / "in", tmp_path / "out")
    other = index.splits["train"].shards[1].documents
    (problem,) = problems_of(with_shard(index, documents=other))
    assert "train-00000.tar: member 2 has other ids where documents end in the index" in problem
    fewer = pack_offsets(index.splits["train"].shards[0].document_ends()[1:])
    problem = problems_of(with_shard(index, documents=fewer))[0]
    assert "train-00000.tar: its tokens decode to" in problem


@pytest.mark.parametrize("name", ["trax_sentencepiece", "google_test_model"])
def test_published_models_are_reported_as_lossy(tmp_path, name):
    model = SentencePieceTokenizer.read(shared(f"data/spm/{name}.model"), documents=True)
    make_corpus(tmp_path / "in", 30)
    index, _ = prepare_documents(tmp_path / "in", tmp_path / "out", model)
    line = tokenizer_line(index)
    assert f"sentencepiece, {model.vocab_size:,} ids, id {model.eod} ends a document" in line
    assert "lossy: its normaliser" in line
    for reason in ("removes extra spaces", "adds a leading space", "lacks byte pieces"):
        assert reason in line
    assert problems_of(index) == []


def test_tokenizer_line(index, tmp_path, model_file):
    assert tokenizer_line(index) == "bytes, 256 ids, no id ends a document; lossless"
    make_corpus(tmp_path / "in", 30)
    model = SentencePieceTokenizer.read(model_file, documents=True)
    prepared, _ = prepare_documents(tmp_path / "in", tmp_path / "out", model)
    line = tokenizer_line(prepared)
    assert "600 ids, id 1 ends a document, model sha256 " in line
    assert line.endswith("; lossless")


def test_samples_are_parts_of_the_text(index):
    samples = list(draw_samples(index, "train", count=5, length=40, seed=3))
    again = list(draw_samples(index, "train", count=5, length=40, seed=3))
    assert samples == again and len({sample.position for sample in samples}) == 5
    tokenizer = index.open_tokenizer()
    for sample in samples:
        text = TEXT[sample.position : sample.position + 40]
        assert sample.text == display_text(np.frombuffer(text, np.uint8), tokenizer)
    (complete,) = draw_samples(index, "validation", count=1, length=10**9, seed=0)
    assert complete.position == 0
    with pytest.raises(DataError, match="the split 'dev' is empty"):
        next(draw_samples(index, "dev", count=1, length=None, seed=0))


def test_document_ends_and_control_characters_are_shown():
    tokenizer = ByteTokenizer(documents=True)
    tokens = np.array([*"é\t\n".encode(), 256, 0xFF, 0x1B, ord("["), 0, 0x7F, 13, 0xC2, 0x9B])
    assert display_text(tokens, tokenizer) == f"é\t\n{END_MARK}\ufffd␛[␀␡␍\ufffd"
    # Without documents there are no ends to mark.
    assert display_text(tokens[:4].astype(np.uint8), ByteTokenizer(documents=False)) == "é\t\n"[:3]


def test_images_are_drawn_by_brightness():
    pixels = np.array([[[0, 0, 0], [255, 255, 255]], [[255, 0, 0], [90, 90, 75]]], np.uint8)
    assert draw_image(pixels) == "  @@\n----"
    assert draw_image(np.zeros((2, 3, 1), np.uint8)) == " " * 6 + "\n" + " " * 6
