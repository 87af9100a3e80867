"""Files are classified by their contents first, in one place."""

import bz2
import gzip
import io
import tarfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import feather, ipc, parquet

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.file_format import (
    format_by_name,
    format_of,
    inspect_file,
    inspect_files,
    is_never_empty,
)
from hg_scale.data.preparation.skipping import SkipLog, SkipPolicy

TABLE = pyarrow.table({"text": ["one", "two"]})


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.jsonl", "lines"), ("a.json.gz", "lines"), ("a.ndjson.zst", "lines"), ("a.txt", "text"),
     ("a.JSONL.tmp", "lines"), ("a.csv.bz2", "csv"), ("a.tsv", "tsv"), ("a", "text"),
     ("jsonl", "text"), ("a.json.v2", "text"), ("a.parquet", "text")],
)  # fmt: skip
def test_the_name_tells_kinds_of_text(name, kind):
    assert format_by_name(Path(name)) == kind


def write_arrow(path, new):
    with new(str(path), TABLE.schema) as writer:
        writer.write_table(TABLE)


@pytest.mark.parametrize("name", ["a.parquet", "a.pq", "a.parq", "a.parquet.tmp", "a", "a.txt"])
def test_tables_are_recognised_whatever_their_name(tmp_path, name):
    path = tmp_path / name
    parquet.write_table(TABLE, path)
    assert inspect_file(path).format == format_of(path) == "parquet"
    write_arrow(path, ipc.new_file)
    assert inspect_file(path).format == format_of(path) == "arrow file"
    write_arrow(path, ipc.new_stream)
    assert inspect_file(path).format == format_of(path) == "arrow stream"
    feather.write_feather(TABLE, path, compression="lz4")
    assert inspect_file(path).format == format_of(path) == "arrow file"
    assert inspect_file(path).binary is None


def test_compressed_files_are_looked_into(tmp_path):
    path = tmp_path / "a.jsonl.dz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    found = inspect_file(path)
    assert (found.format, found.compressed, found.binary) == ("lines", True, None)
    buffer = io.BytesIO()
    parquet.write_table(TABLE, buffer)
    path.write_bytes(bz2.compress(buffer.getvalue()))
    assert inspect_file(path).format == "parquet" and is_never_empty(path, inspect_file(path))
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    assert inspect_file(path).binary == "a tar archive in a compressed file"
    path.write_bytes(gzip.compress(gzip.compress(b"text")))
    assert inspect_file(path).binary == "gzip data in a compressed file"
    path.write_bytes(gzip.compress(bytes(range(256)) * 9))
    assert inspect_file(path).binary == "binary data"


@pytest.mark.parametrize("offset", [0, 500_000, 999_000])
def test_samples_are_taken_at_the_beginning_in_the_middle_and_at_the_end(tmp_path, offset):
    content = bytearray(b"some text\n" * 100_000)
    (tmp_path / "a.txt").write_bytes(content)
    assert inspect_file(tmp_path / "a.txt").binary is None
    content[offset : offset + 1000] = bytes(1000)
    (tmp_path / "a.txt").write_bytes(content)
    assert inspect_file(tmp_path / "a.txt").binary == "binary data"


def test_contents_that_a_name_does_not_promise(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"<html>Sign in</html>")
    with pytest.raises(DataError, match=r"a\.parquet: is no Parquet file, but text; download it"):
        inspect_files([tmp_path / "a.parquet"])
    (tmp_path / "b.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid x\n")
    with pytest.raises(DataError, match="a Git LFS pointer.*git lfs pull"):
        inspect_files([tmp_path / "b.parquet"])
    (tmp_path / "c.png").write_bytes(b"a text")
    path = tmp_path / "c.png"
    assert inspect_files([path])[path].format == "text"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n\0", "is a PNG image, not text; data_prep/prepare_images.py"),
        ("text".encode("utf-16"), "is UTF-16, not text; convert it with iconv -f UTF-16 -t UTF-8"),
        (b"PK\3\4" + bytes(60), "is a zip archive, not text; decompress it"),
        (b"%PDF-1.7\n", "is a PDF document, not text; extract its text"),
        (bytes(99), "is binary data, not text"),
    ],
)
def test_binary_files_are_refused_by_name(tmp_path, content, message):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(b"a text")
    (tmp_path / "b.txt").write_bytes(content)
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    with pytest.raises(DataError, match=rf"b\.txt: {message}.*--bytes-as-they-are") as caught:
        inspect_files(paths)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError) as caught:
        inspect_files(paths, option=False)
    assert "--bytes-as-they-are" not in str(caught.value)


def test_many_binary_files_are_counted(tmp_path):
    paths = [tmp_path / f"{number}.bin" for number in range(9)]
    for path in paths:
        path.write_bytes(bytes(50) if path.stem < "6" else b"text")
    with pytest.raises(DataError) as caught:
        inspect_files(paths)
    assert "0.bin (binary data)" in str(caught.value)
    assert "and 3 more: 6 of 9 files are not text" in str(caught.value)


def test_binary_files_can_be_left_out(tmp_path):
    (tmp_path / "a").write_bytes(b"\x7fELF")
    (tmp_path / "b.gz").write_bytes(b"no gzip")
    (tmp_path / "c").write_bytes(b"a text")
    log = SkipLog(SkipPolicy("skip"))
    assert list(inspect_files(sorted(tmp_path.iterdir()), log)) == [tmp_path / "c"]
    assert [item.kind for item in log.items] == ["file", "file"]
    assert "is an ELF program" in " ".join(item.reason for item in log.items)


def test_tables_where_only_text_is_read(tmp_path):
    parquet.write_table(TABLE, tmp_path / "a")
    with pytest.raises(DataError, match="is Parquet, not text; data_prep/prepare_text.py reads"):
        inspect_files([tmp_path / "a"], only_text=True)


@pytest.mark.parametrize("name", ["b.jsonl.lz4", "b.txt.BR", "b.lz4", "b.7z", "b.tar"])
def test_unsupported_compression_is_refused(tmp_path, name):
    """It would become a document of compressed bytes; brotli has no signature."""
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(DataError, match=rf"{name}: is {Path(name).suffix.lower()} data"):
        inspect_files([tmp_path / name])
