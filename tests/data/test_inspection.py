from pathlib import Path

import numpy as np
import pytest

from hg_scale.data.errors import DataError
from hg_scale.data.index import Index
from hg_scale.data.inspection import (
    END_MARK,
    decode,
    draw_image,
    sample_windows,
    shard_problems,
    tokenizer_line,
)
from hg_scale.data.tokenizer import ByteTokenizer, SentencePieceTokenizer
from tests.data.conftest import TEXT, make_folder, prepare
from tests.data.preparation.test_shuffled import make_corpus
from tests.data.preparation.test_shuffled import run as prepare_documents
from tests.shared import shared


def faults(index):
    tokenizer = index.open_tokenizer()
    shards = [shard for split in index.splits.values() for shard in split.shards]
    return [fault for shard in shards for fault in shard_problems(index, shard, tokenizer)]


def damage(index, file, change):
    path = Path(index.location, file)
    path.write_bytes(change(bytearray(path.read_bytes())))


def flipped(place):
    def change(content):
        content[place] ^= 1
        return content

    return change


def with_shard(index, **values):
    """The index with another first training shard."""
    tree = index.model_dump()
    split = tree["splits"]["train"]
    split["shards"][0] |= values
    for key in ("tokens", "text_bytes"):
        split[key] = sum(shard[key] for shard in split["shards"])
    other = Index(**tree)
    other._location = index.location
    return other


def test_whole_shards_have_no_faults(index, tmp_path, model_file):
    assert faults(index) == []
    make_folder(tmp_path / "in")
    assert faults(prepare(tmp_path / "in", tmp_path / "out")) == []
    make_corpus(tmp_path / "texts", 60)
    for number, tokenizer in enumerate(
        (ByteTokenizer(documents=True), SentencePieceTokenizer.read(model_file, documents=True))
    ):
        prepared, _ = prepare_documents(tmp_path / "texts", tmp_path / f"{number}", tokenizer)
        assert faults(prepared) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flipped(512 + 300), "member 0: the checksum differs"),
        (flipped(20), r"cannot be read at member 0 \(bad checksum\)"),  # in its name
        (lambda content: content[:2000], r"cannot be read at member 1.*\(and 4 more\)"),
        (lambda content: content[:-1024], "bytes with sha256"),  # its end, that nothing needs
        (lambda content: content + bytes(512), "10752 bytes with sha256.*says 10240"),
        (lambda content: b"", "cannot be read at member 0"),
    ],
)
def test_a_damaged_shard_is_one_line(copied, change, message):
    damage(copied, "train-00001.tar", change)
    (fault,) = faults(copied)
    assert "train-00001.tar" in fault and "\n" not in fault
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(fault)


def test_a_missing_shard(copied):
    Path(copied.location, "validation-00000.tar").unlink()
    (fault,) = faults(copied)
    assert "validation-00000.tar: the shard is missing" in fault


def test_an_index_of_other_shards(copied, tmp_path):
    """Whole shards, but not what the index says they hold."""
    wrong = with_shard(copied, text_bytes=2999)
    (fault,) = faults(wrong)
    assert "train-00000.tar: its tokens stand for 3000 bytes of text, the index says 2999" in fault
    make_folder(tmp_path / "in")
    index = prepare(tmp_path / "in", tmp_path / "out")
    other = index.splits["train"].shards[1].documents
    (fault,) = faults(with_shard(index, documents=other))
    assert "train-00000.tar:" in fault and "documents end there, not" in fault


@pytest.mark.parametrize("name", ["trax_sentencepiece", "google_test_model"])
def test_given_models_do_not_give_text_back(tmp_path, name):
    model = SentencePieceTokenizer.read(shared(f"data/spm/{name}.model"), documents=True)
    make_corpus(tmp_path / "in", 30)
    index, _ = prepare_documents(tmp_path / "in", tmp_path / "out", model)
    line = tokenizer_line(index)
    assert f"sentencepiece, {model.vocab_size:,} ids, id {model.eod} ends a document" in line
    assert "does not give text back as it was: its normaliser" in line
    for reason in ("removes extra spaces", "puts a space in front", "lacks byte pieces"):
        assert reason in line
    assert faults(index) == []


def test_what_the_tokenizer_is(index, tmp_path, model_file):
    assert tokenizer_line(index) == "bytes, 256 ids, no id ends a document; gives every text back"
    make_corpus(tmp_path / "in", 30)
    model = SentencePieceTokenizer.read(model_file, documents=True)
    prepared, _ = prepare_documents(tmp_path / "in", tmp_path / "out", model)
    line = tokenizer_line(prepared)
    assert "600 ids, id 1 ends a document, model sha256 " in line
    assert line.endswith("; gives every text back")


def test_samples_are_windows_of_the_text(index):
    windows = list(sample_windows(index, "train", windows=5, length=40, seed=3))
    again = list(sample_windows(index, "train", windows=5, length=40, seed=3))
    assert windows == again and len({window.position for window in windows}) == 5
    tokenizer = index.open_tokenizer()
    for window in windows:
        text = TEXT[window.position : window.position + 40]
        assert window.text == decode(np.frombuffer(text, np.uint8), tokenizer)
    (whole,) = sample_windows(index, "validation", windows=1, length=10**9, seed=0)
    assert whole.position == 0
    with pytest.raises(DataError, match="the split 'dev' is empty"):
        next(sample_windows(index, "dev", windows=1, length=None, seed=0))


def test_ends_and_odd_characters_are_shown():
    tokenizer = ByteTokenizer(documents=True)
    tokens = np.array([*"é\t\n".encode(), 256, 0xFF, 0x1B, ord("["), 0, 0x7F, 13, 0xC2, 0x9B])
    assert decode(tokens, tokenizer) == f"é\t\n{END_MARK}\ufffd␛[␀␡␍\ufffd"
    # Without documents there is no end to be marked.
    assert decode(tokens[:4].astype(np.uint8), ByteTokenizer(documents=False)) == "é\t\n"[:3]


def test_images_are_drawn_by_brightness():
    pixels = np.array([[[0, 0, 0], [255, 255, 255]], [[255, 0, 0], [90, 90, 75]]], np.uint8)
    assert draw_image(pixels) == "  @@\n----"
    assert draw_image(np.zeros((2, 3, 1), np.uint8)) == " " * 6 + "\n" + " " * 6
