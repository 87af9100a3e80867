import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.batches import DocumentBatch
from hg_scale.data.preparation.corpus import (
    KEY_BITS,
    DocumentKeys,
    SourceFile,
    choose_split,
    fingerprint,
    list_files,
    make_tasks,
)


@given(
    sizes=st.lists(st.integers(0, 5 << 20), max_size=30),
    splittable=st.lists(st.booleans(), min_size=30, max_size=30),
    multiple=st.sampled_from([1, 1 << 16]),
)
def test_tasks_contain_every_byte_once(sizes, splittable, multiple):
    files = [SourceFile(str(n), str(n), size, 0) for n, size in enumerate(sizes)]
    tasks = make_tasks(files, lambda file: splittable[int(file.name)], multiple)
    assert [task.number for task in tasks] == list(range(len(tasks)))
    segments = [segment for task in tasks for segment in task.segments]
    assert segments == sorted(segments)
    for number, size in enumerate(sizes):
        spans = [(s.begin, s.end) for s in segments if s.file == number]
        ends = [begin for begin, _ in spans[1:]] + [size] * bool(size)
        assert [end for _, end in spans] == ends
        assert [begin for begin, _ in spans[:1]] == [0] * bool(size)
        assert len(spans) <= 1 or splittable[number]
        assert all(begin % multiple == 0 for begin, _ in spans)
    for task in tasks:
        assert task.stored_bytes <= (2 << 20) or len(task.segments) == 1


def test_large_files_are_split_into_many_tasks():
    one = [SourceFile("a", "a", 1 << 30, 0)]
    assert len(make_tasks(one, lambda file: True)) == 64
    assert len(make_tasks(one, lambda file: False)) == 1
    huge = [SourceFile("a", "a", 1 << 40, 0)]
    assert {task.stored_bytes for task in make_tasks(huge, lambda file: True)} == {1 << 28}


def keys_of(split, seed):
    """Return a function that computes the key of one document."""
    keys = DocumentKeys(split, seed)
    return lambda file, position, content: int(
        keys(file, np.array([position]), DocumentBatch.single(content))[0]
    )


def test_keys_of_many_documents_are_those_of_each():
    """And those of earlier versions, so that corpora stay as they are."""
    keys, file = DocumentKeys((0.5, 0.25, 0.25), seed=3), SourceFile("/x/a", "a", 1, 0)
    contents = [b"text %d" % number * (number % 30 + 1) for number in range(2000)]
    positions = np.arange(2000) * 7 + 2**40
    salt = (3).to_bytes(16, "big", signed=True)
    name = hashlib.blake2b(b"a", key=salt, digest_size=32).digest()

    def expected(position, content):
        order = hashlib.blake2b(position.to_bytes(8, "big"), key=name, digest_size=8).digest()
        where = hashlib.blake2b(content, key=salt, digest_size=8).digest()
        share = int.from_bytes(where, "big") / 2**64
        split = 0 if share < 0.5 else 1 if share < 0.75 else 2
        return split << KEY_BITS | int.from_bytes(order, "big") >> (64 - KEY_BITS)

    found = keys(file, positions, DocumentBatch.joined(contents)).tolist()
    assert found == list(map(expected, positions.tolist(), contents))


@pytest.mark.parametrize(
    ("fractions", "digest", "split"),
    [((0.5, 0.25, 0.25), 2**63 - 1, 1), ((0.5, 0.25, 0.25), 2**63 - 2**10, 0),
     ((0.5, 0.25, 0.25), 2**63, 1), ((1.0, 0.0, 0.0), 2**64 - 1, 0), ((0.0, 0.0, 1.0), 0, 2),
     ((0.9, 0.1 - 1e-7, 0.0), 2**64 - 1, 1)],
)  # fmt: skip
def test_split_of_a_hash(fractions, digest, split):
    """Hashes are rounded to float64, and what rounding leaves over is of the last split."""
    assert choose_split(digest, fractions) == split


def test_keys_depend_on_content_file_and_position():
    keys = keys_of((0.5, 0.25, 0.25), seed=3)
    a, b = SourceFile("/x/a", "a", 1, 0), SourceFile("/y/b", "b", 1, 0)
    some = [keys(a, position, b"text %d" % position) for position in range(4000)]
    assert some == [keys(a, position, b"text %d" % position) for position in range(4000)]
    splits = [key >> KEY_BITS for key in some]
    assert abs(splits.count(0) / 4000 - 0.5) < 0.03 and abs(splits.count(2) / 4000 - 0.25) < 0.03
    # Equal content, equal split; another file, another position in the order.
    again = [keys(b, position + 7, b"text %d" % position) for position in range(4000)]
    assert [key >> KEY_BITS for key in again] == splits
    assert not set(again) & set(some)
    # The shuffled order is independent of the source's.
    order = sorted(range(4000), key=lambda n: some[n] & (1 << KEY_BITS) - 1)
    assert abs(sum(abs(x - n) for n, x in enumerate(order)) / 4000 - 4000 / 3) < 60
    assert [keys_of((0.5, 0.25, 0.25), seed=4)(a, 0, b"text 0")] != some[:1]


def test_splits_by_folder():
    keys = keys_of(None, seed=0)
    for name, split in [("train/a", 0), ("val/b/c", 1), ("validation/x", 1), ("0:test/y", 2)]:
        assert keys(SourceFile(name, name, 1, 0), 0, b"x") >> KEY_BITS == split
    for name in ("other/a", "train", "a/train/b"):
        with pytest.raises(DataError, match="needs every file below train/"):
            keys(SourceFile(name, name, 1, 0), 0, b"x")


def test_files_of_several_inputs(tmp_path):
    for name in ("in/b.txt", "in/sub/a.txt", "in/c.md", "more/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    files = list_files([tmp_path / "in", tmp_path / "more/b.txt"], ["*.txt"])
    assert [file.name for file in files] == ["0:b.txt", "0:sub/a.txt", "1:b.txt"]
    assert [file.size for file in files] == [8, 12, 10]
    with pytest.raises(DataError, match=r"b\.txt is also in --input .*in; name it once"):
        list_files([tmp_path / "in", tmp_path / "in" / "b.txt"])
    single = list_files([tmp_path / "in"])
    assert [file.name for file in single] == ["b.txt", "c.md", "sub/a.txt"]
    before = fingerprint(single)
    (tmp_path / "in/c.md").write_text("in/c.mD")
    changed = list_files([tmp_path / "in"])
    after = fingerprint(changed)
    assert [key for key in after if after[key] != before[key]] == ["times of the files"]
    with pytest.raises(DataError, match="absent: cannot be read"):
        list_files([tmp_path / "absent"])
