import numpy as np
import pytest

from hg_scale.data.errors import DataError
from hg_scale.data.tokenizer import (
    ByteTokenizer,
    TokenizerIdentity,
    load_tokenizer,
    token_dtype,
)


@pytest.mark.parametrize(("documents", "dtype"), [(False, np.uint8), (True, np.uint16)])
def test_every_byte_comes_back(documents, dtype):
    tokenizer = ByteTokenizer(documents=documents)
    text = bytes(range(256))
    tokens = tokenizer.encode(text)
    assert tokens.dtype == dtype and tokens.tolist() == list(range(256))
    assert tokenizer.decode(tokens) == text
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]


def test_end_of_document_is_no_text():
    tokenizer = ByteTokenizer(documents=True)
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    tokens = np.array([104, 105, 256, 0])
    assert tokenizer.decode(tokens) == b"hi\0"
    assert tokenizer.count_bytes(tokens) == 3


@pytest.mark.parametrize("documents", [False, True])
def test_loaded_by_its_identity(documents):
    tokenizer = ByteTokenizer(documents=documents)
    assert load_tokenizer(tokenizer.identity).identity == tokenizer.identity


@pytest.mark.parametrize(
    "identity",
    [
        TokenizerIdentity(name="runes", vocab_size=24, eod=None),
        TokenizerIdentity(name="bytes", vocab_size=256, eod=0),
    ],
)
def test_unknown_identity(identity):
    with pytest.raises(DataError, match=f"tokenizer '{identity.name}'.*is not one this version"):
        load_tokenizer(identity)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(256, "|u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4")],
)
def test_dtype_holds_the_vocabulary(vocab_size, dtype):
    assert token_dtype(vocab_size).str == dtype
