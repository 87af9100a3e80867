"""Which files of a folder are read, and what is left out by default."""

import os

import pytest

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.folders import LeftOut, find_files


def test_files_are_sorted_and_filtered(tmp_path):
    for name in ("b.py", "a/z.py", "a/y.txt", "a/tests/t.py", "a-b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_files(tmp_path, ["*"], []) == [
        "a-b.py", "a/tests/t.py", "a/y.txt", "a/z.py", "b.py",
    ]  # fmt: skip
    assert find_files(tmp_path, ["*.py"], ["*/tests/*"]) == ["a-b.py", "a/z.py", "b.py"]
    assert find_files(tmp_path, ["a/*.txt", "b.py"], []) == ["a/y.txt", "b.py"]
    with pytest.raises(DataError, match=r"no file matches --include \*\.c without --exclude x"):
        find_files(tmp_path, ["*.c"], ["x"])


def test_broken_links_are_reported(tmp_path):
    """The cache of an unfinished download contains such links."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").symlink_to(tmp_path / "blob")
    (tmp_path / "in" / "b.txt").touch()
    with pytest.raises(
        DataError, match=r"a\.txt: links to '.*blob', which does not exist; download it"
    ):
        find_files(tmp_path / "in", ["*"], [])
    assert find_files(tmp_path / "in", ["*"], ["a.*"]) == ["b.txt"]
    (tmp_path / "blob").touch()
    assert find_files(tmp_path / "in", ["*"], []) == ["a.txt", "b.txt"]


def listed(folder, names, include=("*",)):
    """Write empty files, and return those that are read and the counts of the others."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    left_out = LeftOut()
    return find_files(folder, include, [], left_out=left_out), dict(left_out.counts), left_out


SPARK = ["part-0.json", "_SUCCESS", "._SUCCESS.crc", ".part-0.json.crc", "_committed_12",
         "_delta_log/0.json", "_temporary/0/part-1.json", "part-0.json.md5"]  # fmt: skip


def test_hidden_and_side_files_are_left_out_and_counted(tmp_path):
    found, counts, left_out = listed(tmp_path, SPARK)
    assert found == ["part-0.json"]
    assert counts == {"hidden (name begins with a dot)": 2, "side file of another program": 5}
    assert (
        "  left out 5: side file of another program (_delta_log/, _temporary/, _SUCCESS, ...)"
        in left_out.lines()
    )
    assert left_out.by_default() == counts


def test_sources_that_begin_with_an_underscore_are_read(tmp_path):
    names = ["_index.md", "_posts/a.md", "pkg/__init__.py", "pkg/_compat.py"]
    found, counts, _ = listed(tmp_path, [*names, ".git/config", "pkg/__pycache__/a.pyc", "a.txt~"])
    assert (found, sorted(counts.values())) == (names, [1, 2])


def test_patterns_can_ask_for_hidden_and_side_files(tmp_path):
    names = [".github/a.md", ".git/a.md", "a.md", "_SUCCESS", "x.crc"]
    assert listed(tmp_path, names, [".github/*", "a.md"])[0] == [".github/a.md", "a.md"]
    assert listed(tmp_path, names, ["_*", "*.crc"])[0] == ["_SUCCESS", "x.crc"]
    assert listed(tmp_path, names, ["*.md"])[0] == ["a.md"]


def test_only_hidden_files_are_reported(tmp_path):
    with pytest.raises(DataError, match=r"no file matches --include \* \(left out 1: hidden"):
        listed(tmp_path, [".a"])


def test_a_table_under_a_temporary_name_is_read(tmp_path):
    (tmp_path / "a.parquet.tmp").write_bytes(b"PAR1\x15\4")
    assert listed(tmp_path, ["b.txt", "c.txt.tmp"])[0] == ["a.parquet.tmp", "b.txt"]


def test_a_hub_cache_is_read_through_its_snapshots(tmp_path):
    hub = tmp_path / "datasets--me--text"
    names = ["blobs/1a", "blobs/2b", "refs/main", "snapshots/v1/README.md"]
    listed(tmp_path, [f"{hub.name}/{name}" for name in names])
    (tmp_path / "version.txt").write_text("1")
    for version, blob in (("v1", "1a"), ("v2", "1a"), ("v2", "2b")):
        link = hub / "snapshots" / version / "data" / f"{blob}.txt"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(hub / "blobs" / blob)
    left_out = LeftOut()
    found = find_files(tmp_path, ["*"], [], left_out=left_out)
    assert [name.partition("snapshots/")[2] for name in found] == [
        "v1/README.md", "v1/data/1a.txt", "v2/data/2b.txt",
    ]  # fmt: skip
    assert left_out.counts["another link to a file that is read"] == 1
    assert left_out.counts["hub cache, read through snapshots/"] == 3  # two folders, a file


def test_linked_folders_and_pipes_are_counted(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").touch()
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    (folder / ".#lock").symlink_to("nobody@nowhere")  # of an editor
    found, counts, left_out = listed(folder, ["a.txt", "README.md"], ["*.txt", "pipe"])
    assert found == ["a.txt"]
    assert counts == {
        "link to a folder, not followed": 2, "pipe, socket or device": 1,
        "by --include and --exclude": 2,
    }  # fmt: skip
    assert "link -> " in left_out.names["link to a folder, not followed"][0]
    assert left_out.by_default() == {}
