from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from hg_scale.data.errors import DataError
from hg_scale.data.tokenizer import (
    ByteTokenizer,
    SentencePieceTokenizer,
    TokenizerIdentity,
    load_tokenizer,
    token_dtype,
)
from tests.data.conftest import prose
from tests.shared import shared


@pytest.fixture(scope="module")
def tokenizer(model_file):
    return SentencePieceTokenizer.read(model_file, documents=True)


@pytest.mark.parametrize(("documents", "dtype"), [(False, np.uint8), (True, np.uint16)])
def test_bytes_round_trip(documents, dtype):
    tokenizer = ByteTokenizer(documents=documents)
    text = bytes(range(256))
    tokens = tokenizer.encode(text)
    assert tokens.dtype == dtype and tokens.tolist() == list(range(256))
    assert tokenizer.decode(tokens) == text
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert tokenizer.encode(memoryview(text)[7:9]).tolist() == [7, 8]


def test_end_of_document_decodes_to_nothing():
    tokenizer = ByteTokenizer(documents=True)
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    tokens = np.array([104, 105, 256, 0])
    assert tokenizer.decode(tokens) == b"hi\0"
    assert tokenizer.count_bytes(tokens) == 3


@pytest.mark.parametrize("documents", [False, True])
def test_tokenizer_is_loaded_by_its_identity(documents, model_file):
    for tokenizer in (
        ByteTokenizer(documents=documents),
        SentencePieceTokenizer.read(model_file, documents=documents),
    ):
        again = load_tokenizer(tokenizer.identity, model_file.read_bytes())
        assert again.identity == tokenizer.identity


@pytest.mark.parametrize(
    "identity",
    [
        TokenizerIdentity(name="runes", vocab_size=24, eod=None),
        TokenizerIdentity(name="bytes", vocab_size=256, eod=0),
        TokenizerIdentity(name="sentencepiece", vocab_size=24, eod=0, sha256="0" * 64),
    ],
)
def test_unknown_identity_is_refused(identity):
    with pytest.raises(DataError, match=f"tokenizer '{identity.name}'.*is unknown to this version"):
        load_tokenizer(identity)


def test_model_with_another_checksum_is_refused(model_file):
    identity = SentencePieceTokenizer.read(model_file, documents=True).identity
    with pytest.raises(DataError, match="has sha256 .* the index names .*: copy the model"):
        load_tokenizer(identity, model_file.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(256, "|u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4")],
)
def test_dtype_fits_the_vocabulary(vocab_size, dtype):
    assert token_dtype(vocab_size).str == dtype


ODD = [
    "", " ", "  a", "a ", "\n", "\n\n\n", "\t\t x\r\n", "a▁b", "▁", "▁▁ ▁", "\0", "a\0b\0",
    "<|end_of_document|>", "<unk>", "<0x41>", "</s>", "⁇", "▅", "\ufffd", "\ufeffa", "e\u0301",
    "\U0010ffff", "漢字 é",
]  # fmt: skip
INVALID_UTF8 = [b"\xff", b"a\xc3", b"\xe2\x96 \x81", b"\xed\xa0\x80", bytes(range(256))]


@pytest.mark.parametrize("text", [text.encode() for text in ODD] + INVALID_UTF8)
def test_unusual_text_round_trips(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.count_bytes(tokens) == len(text)
    assert not np.isin(tokens, [0, tokenizer.eod]).any()  # unknown, end of document


@settings(deadline=None)
@given(st.one_of(st.binary(), st.text().map(str.encode), st.lists(
    st.sampled_from([b"ka", b"to ", b" ", b"\n", "▁".encode(), b"\xff", "漢".encode(), b"\t"])
).map(b"".join)))  # fmt: skip
def test_any_text_round_trips(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.count_bytes(tokens) == len(text)


def test_ids_equal_those_of_sentencepiece(tokenizer, model_file):
    text = prose(3000, seed=5)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint16
    assert tokens.tolist() == processor.encode(text)
    assert len(tokens) < len(text.encode()) / 2


@pytest.mark.parametrize("unit", ["a" * 50 + "\n", "word ", "x", "漢", "é", "\U0001f600"])
def test_splitting_long_text_costs_few_tokens(tokenizer, unit):
    text = unit.encode() * (200_000 // len(unit.encode()))
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    short = tokenizer.encode(unit * 100)
    assert len(tokens) == pytest.approx(len(short) * len(text) / len(unit.encode()) / 100, rel=0.01)


def test_long_invalid_utf8_round_trips(tokenizer):
    text = b"\x80" * 150_000
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text) and tokenizer.decode(tokens) == text


def test_end_of_document_id_of_models(model_file):
    """End of sentence where the model has one, otherwise the id past the vocabulary."""
    ours = SentencePieceTokenizer.read(model_file, documents=True)
    assert (ours.eod, ours.vocab_size) == (1, 600)
    assert SentencePieceTokenizer.read(model_file, documents=False).eod is None
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model_file.read_bytes())
    proto.trainer_spec.eos_id = -1
    proto.pieces[1].type = proto.pieces[1].UNUSED
    proto.trainer_spec.eos_piece = "<none>"
    without = SentencePieceTokenizer(proto.SerializeToString(), documents=True)
    assert (without.eod, without.vocab_size) == (600, 601)
    assert without.decode(np.array([*without.encode("kato"), 600])) == b"kato"
    assert without.count_bytes(np.array([600])) == 0


@pytest.mark.parametrize(
    ("name", "vocab", "eod", "tokens"),
    [
        ("trax_sentencepiece", 32000, 1, [8774, 296, 5]),
        ("google_test_model", 1000, 2, [151, 88, 21, 887, 6]),
    ],
)
def test_published_models_are_lossy(name, vocab, eod, tokens):
    model = SentencePieceTokenizer.read(shared(f"data/spm/{name}.model"), documents=True)
    assert (model.vocab_size, model.eod) == (vocab, eod)
    assert model.encode("Hello world.").tolist() == tokens
    assert model.decode(np.array([*tokens, eod])).decode() == " Hello world."
    assert not model.round_trips
    assert [reason.split()[1] for reason in model.obstacles] == [
        "normaliser", "removes", "adds", "lacks",
    ]  # fmt: skip
    assert model.encode(b"Hello \xff world.")[0] == tokens[0]


@pytest.mark.parametrize("content", [b"", b"not a model", b"\0" * 100])
def test_invalid_model_file_is_refused(tmp_path, content, capfd):
    path = tmp_path / "x.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.model: not a sentencepiece model: expected"):
        SentencePieceTokenizer.read(path, documents=True)
    with pytest.raises(DataError, match="absent: cannot be read"):
        SentencePieceTokenizer.read(Path("absent"), documents=True)
    assert capfd.readouterr().err == ""
