import pytest
from hypothesis import given
from hypothesis import strategies as st

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.corpus import (
    KEY_BITS,
    DocumentKeys,
    SourceFile,
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


def test_keys_depend_on_content_file_and_position():
    keys = DocumentKeys((0.5, 0.25, 0.25), seed=3)
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
    assert [DocumentKeys((0.5, 0.25, 0.25), seed=4)(a, 0, b"text 0")] != some[:1]


def test_splits_by_folder():
    keys = DocumentKeys(None, seed=0)
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
