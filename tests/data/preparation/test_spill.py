import numpy as np
import pytest

from hg_scale.data.errors import DataError
from hg_scale.data.preparation import spill as module
from hg_scale.data.preparation.spill import Spill, SpillWriter, table_path, text_path


@pytest.mark.parametrize("run_bytes", [1, 1000, 1 << 20])
def test_documents_come_sorted_by_key(tmp_path, monkeypatch, run_bytes):
    """With equal keys in the order of the source, and independent of the memory for a run."""
    monkeypatch.setattr(module, "RUN_BYTES", run_bytes)
    random = np.random.default_rng(0)
    everything = []
    for task in range(5):
        with SpillWriter(tmp_path, task) as spill:
            for number in range(40 if task != 3 else 0):
                key = int(random.integers(0, 60)) << 57
                content = b"%d-%d " % (task, number) + random.bytes(int(random.integers(0, 90)))
                spill.add(key, content)
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
        assert [bytes(content) for content in spill.documents(low, high)] == inside
    size, number = spill.count(6)
    for value in range(64):
        inside = [content for key, content in everything if key >> 58 == value]
        assert (size[value], number[value]) == (sum(map(len, inside)), len(inside))


def test_the_files_of_a_task_appear_when_it_is_complete(tmp_path):
    with pytest.raises(KeyError), SpillWriter(tmp_path, 0) as spill:
        spill.add(1, b"text")
        raise KeyError
    assert not list(tmp_path.iterdir())
    with SpillWriter(tmp_path, 0) as spill:
        spill.add(1, b"text")
    assert sorted(tmp_path.iterdir()) == [table_path(tmp_path, 0), text_path(tmp_path, 0)]


def test_truncated_text_is_noticed(tmp_path):
    with SpillWriter(tmp_path, 0) as spill:
        spill.add(1, b"text")
    text_path(tmp_path, 0).write_bytes(b"te")
    with pytest.raises(DataError, match=r"00000\.text: is truncated"):
        list(Spill(tmp_path, 1).documents(0, 9))
