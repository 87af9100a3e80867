import gzip
import lzma

import pyarrow
import pytest

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.sources import (
    file_digest,
    find_files,
    is_compressed,
    read_blocks,
    text_length,
)


def zstd(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


PACKERS = [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)]
TEXT = b"one two three\n" * 200_000  # 2.8 MB, three blocks


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), *PACKERS])
def test_compressed_files_read_as_text(tmp_path, suffix, pack):
    path = tmp_path / f"text{suffix}"
    path.write_bytes(pack(TEXT))
    blocks = list(read_blocks(path))
    assert b"".join(blocks) == TEXT and max(map(len, blocks)) <= 1 << 20
    assert text_length(path) == len(TEXT)


@pytest.mark.parametrize(("suffix", "pack"), PACKERS)
def test_concatenated_compressed_files(tmp_path, suffix, pack):
    """As parallel compressors write them, and `cat` of compressed files."""
    path = tmp_path / f"text{suffix}"
    path.write_bytes(
        pack(TEXT[:1_500_000]) + pack(TEXT[1_500_000:1_500_003]) + pack(TEXT[1_500_003:])
    )
    assert b"".join(read_blocks(path)) == TEXT


@pytest.mark.parametrize(("suffix", "pack"), PACKERS)
def test_corrupt_compressed_files_are_reported(tmp_path, suffix, pack):
    path = tmp_path / f"text{suffix}"
    for content in (pack(TEXT)[:-20], b"not compressed", pack(TEXT)[:300] + b"?" * 300):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"text\{suffix}: cannot be decompressed") as caught:
            list(read_blocks(path))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["text.gz", "TEXT.GZ", "text.Xz", "text.ZST"])
def test_suffixes_in_any_case(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(dict(PACKERS)[path.suffix.lower()](TEXT))
    assert is_compressed(path) and b"".join(read_blocks(path)) == TEXT


@pytest.mark.parametrize("name", ["b.jsonl.lz4", "b.txt.BR", "b.lz4", "b.7z", "b.tar"])
def test_unsupported_compression_is_refused(tmp_path, name):
    """It would become a document of compressed bytes."""
    for file in ("a.jsonl", name):
        (tmp_path / file).write_bytes(b"{}")
    with pytest.raises(DataError, match=f"{name}: .* files are not supported; decompress it"):
        find_files(tmp_path, ["*"], [])
    assert find_files(tmp_path, ["*"], ["b.*"]) == ["a.jsonl"]


def test_unreadable_files_are_reported(tmp_path):
    for read in (file_digest, lambda path: list(read_blocks(path))):
        with pytest.raises(DataError, match="absent: cannot be read"):
            read(tmp_path / "absent")


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
