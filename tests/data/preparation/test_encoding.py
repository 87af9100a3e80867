import numpy as np
import pytest

from hg_scale.data.preparation import encoding as module
from hg_scale.data.preparation.batches import DocumentBatch
from hg_scale.data.preparation.encoding import encode_documents
from hg_scale.data.tokenizer import ByteTokenizer, SentencePieceTokenizer

CONTENTS = [
    b"one ",
    *[b"short %d" % number for number in range(200)],
    b"x" * 5000,
    b"two",
    b"\0",
    *[b"in\xffvalid"] * 200,
    *["a▁b".encode()] * 400,
    "zwei é".encode(),
]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("documents", [True, False])
def test_tokens_are_those_of_each_document_and_its_end(monkeypatch, model_file, kind, documents):
    monkeypatch.setattr(module, "_PIECE", 900)
    monkeypatch.setattr("hg_scale.data.preparation.batches._BATCH_BYTES", 1000)
    tokenizer = (
        ByteTokenizer(documents=documents)
        if kind == "bytes"
        else SentencePieceTokenizer.read(model_file, documents=documents)
    )
    parts = list(encode_documents(tokenizer, DocumentBatch.joined(CONTENTS)))
    expected = []
    for text in CONTENTS:
        expected += tokenizer.encode(text).tolist()
        expected += [tokenizer.eod] * documents
    assert np.concatenate([ids for ids, _ in parts]).tolist() == expected
    assert sum(count for _, count in parts) == sum(map(len, CONTENTS))
    if kind == "bytes":
        assert max(len(ids) for ids, _ in parts) <= 2 * 1000
