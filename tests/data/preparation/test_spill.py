import numpy as np
import pytest

from hg_scale.data.errors import DataError
from hg_scale.data.preparation import spill as module
from hg_scale.data.preparation.batches import DocumentBatch
from hg_scale.data.preparation.spill import Spill, SpillWriter, table_path, text_path


def add(spill, key, content):
    spill.add(np.array([key], np.uint64), DocumentBatch.single(content))


def contents_of(spill, low, high):
    return [bytes(text) for batch in spill.documents(low, high) for text in batch.documents()]


@pytest.mark.parametrize("run", [(1, 9), (1000, 99), (1 << 20, 7), (1 << 20, 1 << 20)])
def test_documents_come_sorted_by_key(tmp_path, monkeypatch, run):
    """With equal keys in the order of the source, and independent of the memory for a run."""
    monkeypatch.setattr(module, "RUN_BYTES", run[0])
    monkeypatch.setattr(module, "RUN_DOCUMENTS", run[1])
    random = np.random.default_rng(0)
    everything = []
    for task in range(5):
        with SpillWriter(tmp_path, task) as spill:
            for number in range(40 if task != 3 else 0):
                key = int(random.integers(0, 60)) << 57
                content = b"%d-%d " % (task, number) + random.bytes(int(random.integers(0, 90)))
                add(spill, key, content)
                everything.append((key, content))
    expected = sorted(everything, key=lambda entry: entry[0])
    spill = Spill(tmp_path, 5)
    for low, high in [
        (0, 64 << 57),
        (5 << 57, 6 << 57),
        (20 << 57, 50 << 57),
        (61 << 57, 63 << 57),
    ]:
        inside = [content for key, content in expected if low <= key < high]
        assert contents_of(spill, low, high) == inside
    size, number = spill.count(6)
    for value in range(64):
        inside = [content for key, content in everything if key >> 58 == value]
        assert (size[value], number[value]) == (sum(map(len, inside)), len(inside))


def test_the_files_of_a_task_appear_when_it_is_complete(tmp_path):
    with pytest.raises(KeyError), SpillWriter(tmp_path, 0) as spill:
        add(spill, 1, b"text")
        raise KeyError
    assert not list(tmp_path.iterdir())
    with SpillWriter(tmp_path, 0) as spill:
        add(spill, 1, b"text")
    assert sorted(tmp_path.iterdir()) == [table_path(tmp_path, 0), text_path(tmp_path, 0)]


def test_truncated_text_is_noticed(tmp_path):
    with SpillWriter(tmp_path, 0) as spill:
        add(spill, 1, b"text")
    text_path(tmp_path, 0).write_bytes(b"te")
    with pytest.raises(DataError, match=r"00000\.text: is truncated"):
        list(Spill(tmp_path, 1).documents(0, 9))


def test_batches_are_bounded_by_bytes_and_documents(tmp_path, monkeypatch):
    with SpillWriter(tmp_path, 0) as spill:
        for number in range(64):
            add(spill, number << 58, b"x" * (1000 if number == 9 else 10))
    sizes = {}
    for limit in ("RUN_BYTES", "RUN_DOCUMENTS"):
        with monkeypatch.context() as patch:
            patch.setattr(module, limit, 100 if limit == "RUN_BYTES" else 7)
            batches = list(Spill(tmp_path, 1).documents(0, 2**64 - 1))
            sizes[limit] = [len(batch.text) for batch in batches]
            assert max(len(batch.lengths) for batch in batches) <= 10
    assert sorted(sizes["RUN_BYTES"])[-2:] == [80, 1000]  # a long document is alone
    assert sum(sizes["RUN_DOCUMENTS"]) == sum(sizes["RUN_BYTES"]) == 1630


def test_what_a_crash_of_the_machine_lost_is_noticed(tmp_path):
    """The files are not synced, so each may be absent, shorter, or zero in part."""
    with SpillWriter(tmp_path, 0) as spill:
        add(spill, 1, b"text" * 99)
    table, text = table_path(tmp_path, 0), text_path(tmp_path, 0)
    intact = Spill(tmp_path, 1).is_intact
    assert intact(0) and not intact(1)
    for path in (table, text):
        content = path.read_bytes()
        for lost in (b"", content[:-9], b"\0" + content[1:], b"\0" * len(content)):
            path.write_bytes(lost)
            assert not intact(0), (path, len(lost))
        path.unlink()
        assert not intact(0)
        path.write_bytes(content)
    assert intact(0)
