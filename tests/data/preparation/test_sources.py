import gzip
import lzma

import pyarrow
import pytest

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.sources import (
    file_digest,
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


def test_unreadable_files_are_reported(tmp_path):
    for read in (file_digest, lambda path: list(read_blocks(path))):
        with pytest.raises(DataError, match="absent: cannot be read"):
            read(tmp_path / "absent")
