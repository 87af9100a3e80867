import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hg_scale.data.preparation import batches as module
from hg_scale.data.preparation import sources
from hg_scale.data.preparation.batches import DocumentBatch, group_documents, separated_batches

contents_strategy = st.lists(st.binary(max_size=40), min_size=1, max_size=60)


def contents_of(batch):
    return [bytes(text) for text in batch.documents()]


@given(contents=contents_strategy, limits=st.tuples(st.integers(1, 90), st.integers(1, 9)),
       short=st.sampled_from([0, 256]), seed=st.integers(0, 99))  # fmt: skip
def test_packed_batches_are_contiguous_and_bounded(contents, limits, short, seed):
    order = np.random.default_rng(seed).permutation(len(contents))
    batch = DocumentBatch.joined(contents).select(order)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BATCH_BYTES", limits[0])
        patch.setattr(module, "_BATCH_DOCUMENTS", limits[1])
        patch.setattr(module, "_SHORT", short)
        packed = list(batch.packed())
    assert sum(map(contents_of, packed), []) == [contents[number] for number in order]
    for part in packed:
        assert part.text.tobytes() == b"".join(contents_of(part))
        assert len(part.lengths) <= limits[1]
        assert len(part.text) < 2 * limits[0] or len(part.lengths) == 1


@given(contents=contents_strategy, size=st.integers(1, 90))
def test_single_documents_are_grouped(contents, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BATCH_BYTES", size)
        groups = list(group_documents(enumerate(contents)))
    assert np.concatenate([positions for positions, _ in groups]).tolist() == [
        *range(len(contents))
    ]
    assert sum((contents_of(batch) for _, batch in groups), []) == contents
    assert all(len(batch.text) < size + 40 for _, batch in groups)


@pytest.mark.parametrize("separator", [b"\n", b"--"])
def test_a_part_without_a_beginning_is_read_to_its_end_only(tmp_path, monkeypatch, separator):
    """So reading one long line takes no longer with many tasks."""
    monkeypatch.setattr(sources, "_BLOCK", 100)
    path = tmp_path / "text"
    path.write_bytes(b"x" * 10_000 + separator + b"y")
    counts, found = [], []
    for begin in range(0, 10_003, 500):
        advanced = []
        parts = separated_batches(path, separator, begin, begin + 500, advanced.append)
        found += [(p.tolist(), contents_of(batch)) for p, batch in parts]
        counts.append(sum(advanced))
    assert found == [
        ([0], [b"x" * 10_000]), ([10_000 + len(separator)], [b"y"]),
    ]  # fmt: skip
    assert max(counts[1:]) <= 600 and 10_000 < counts[0] < 10_200
