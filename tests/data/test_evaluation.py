import gzip

import numpy as np
import pytest

from hg_scale.data.errors import DataError
from hg_scale.data.evaluation import evaluation_batches, split_bytes, split_text
from tests.data.conftest import TEXT, make_folder, prepare

VALIDATION = np.frombuffer(TEXT[90_003:95_003], np.uint8)  # 5,000 tokens in 2 shards


def gather(index, data_size, **options):
    """Inputs and labels of all ranks, each (sequences, L), in the order of the text."""
    settings = {"sequence_length": 192, "batch_size": 2} | options
    ranks = [
        list(evaluation_batches(index, "validation", data_rank=r, data_size=data_size, **settings))
        for r in range(data_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    inputs, labels = (
        np.concatenate([batch[side] for batches in ranks for batch in batches]) for side in (0, 1)
    )
    assert inputs.dtype == labels.dtype == np.int64
    assert inputs.shape == labels.shape and inputs.shape[1] == settings["sequence_length"]
    return inputs, labels


@pytest.mark.parametrize("data_size", [1, 2, 3, 5, 40])
@pytest.mark.parametrize(
    ("batch_size", "length"), [(1, 192), (3, 192), (4, 1000), (2, 7000), (7, 1)]
)
def test_every_token_is_a_label_once(index, data_size, batch_size, length):
    inputs, labels = gather(index, data_size, batch_size=batch_size, sequence_length=length)
    scored = labels.ravel() >= 0
    assert np.array_equal(labels.ravel()[scored], VALIDATION)
    assert np.array_equal(inputs.ravel()[scored], np.concatenate([[0], VALIDATION[:-1]]))
    assert set(labels.ravel()[~scored]) <= {-1}
    assert inputs.min() >= 0
    # Padding fills the last batches of all ranks, and no more.
    sequences, global_batch = -(-5000 // length), batch_size * data_size
    assert len(labels) == -(-sequences // global_batch) * global_batch


@pytest.mark.parametrize(("limit", "tokens"), [(1, 192), (7, 1344), (26, 4992), (100, 5000)])
def test_max_sequences_selects_the_first(index, limit, tokens):
    for data_size in (1, 3):
        _, labels = gather(index, data_size, max_sequences=limit)
        assert np.array_equal(labels.ravel()[labels.ravel() >= 0], VALIDATION[:tokens])


def test_first_input_is_the_end_of_document_id(tmp_path):
    documents = make_folder(tmp_path / "in")
    index = prepare(tmp_path / "in", tmp_path / "out", split=(0.5, 0.5, 0.0))
    inputs, labels = gather(index, 2)
    assert inputs[0, 0] == index.eod == 256
    assert np.count_nonzero(labels == 256) == index.splits["validation"].documents
    texts = [split_text(index, name) for name in ("train", "validation")]
    assert sum(map(len, texts)) == sum(map(len, documents.values()))


def test_documents_of_equal_length_are_scored_independently(index):
    """Images: the input before the first token of each is 0."""
    images = index.model_copy(update={"document_tokens": 50})
    images._location = index.location
    for data_size in (1, 3):
        inputs, labels = gather(images, data_size, sequence_length=50)
        inputs, labels = inputs[labels[:, 0] >= 0], labels[labels[:, 0] >= 0]
        assert np.array_equal(labels, VALIDATION.reshape(100, 50))
        assert np.array_equal(inputs[:, 1:], labels[:, :-1]) and not inputs[:, 0].any()
    inputs, _ = gather(images, 1, sequence_length=25)
    assert inputs[1, 0] == VALIDATION[24]


def test_split_text_and_bytes(index):
    for name, text in {
        "train": TEXT[:90_003],
        "validation": TEXT[90_003:95_003],
        "test": TEXT[95_003:],
    }.items():
        assert split_text(index, name) == text
        assert split_bytes(index, name) == len(text)
    assert len(gzip.compress(split_text(index, "test"))) > 5000  # random bytes


def test_empty_split_is_refused(writable):
    with pytest.raises(DataError, match="'test' is empty"):
        next(evaluation_batches(writable, "test", sequence_length=8, batch_size=1))
