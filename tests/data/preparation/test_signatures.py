"""Formats are recognised by their bytes, and text never is one."""

import io
import pickle
import tarfile
import zipfile

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pyarrow import ipc, orc, parquet

from hg_scale.data.preparation.signatures import binary_by_statistics, signature_of

TABLE = pyarrow.table({"text": ["one", "two"]})


def _buffer(write) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def _tar(buffer: io.BytesIO, kind: int) -> None:
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())


def _arrow(buffer: io.BytesIO, new) -> None:
    with new(buffer, TABLE.schema) as writer:
        writer.write_table(TABLE)


def _zip(buffer: io.BytesIO, name: str) -> None:
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "x")


def _image(kind: str):
    return lambda buffer: Image.new("RGB", (3, 2)).save(buffer, kind)


WRITTEN = {
    "Parquet": lambda b: parquet.write_table(TABLE, b),
    "an Arrow file": lambda b: _arrow(b, ipc.new_file),
    "an Arrow stream": lambda b: _arrow(b, ipc.new_stream),
    "ORC": lambda b: orc.write_table(TABLE, b),
    "a NumPy array": lambda b: np.save(b, np.zeros(3)),
    "a NumPy .npz archive": lambda b: np.savez(b, a=np.zeros(3)),
    "a zip archive": lambda b: _zip(b, "a.txt"),
    "a PyTorch checkpoint": lambda b: _zip(b, "model/data.pkl"),
    "a Python pickle": lambda b: pickle.dump({"a": [1]}, b),
    "safetensors weights": lambda b: b.write((16).to_bytes(8, "little") + b'{"a":{}}        '),
    "a PNG image": _image("PNG"),
    "a JPEG image": _image("JPEG"),
    "a GIF image": _image("GIF"),
    "a TIFF image": _image("TIFF"),
    "a BMP image": _image("BMP"),
    "a WebP image": _image("WEBP"),
    "a PDF document": _image("PDF"),
    "MP4 video or audio": lambda b: b.write(b"\0\0\0\x20ftypisom\0\0\2\0"),
    "MP3 audio": lambda b: b.write(b"ID3\x03\0\0\0\0\0\x0fTIT2"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_files_as_their_libraries_write_them(name):
    assert signature_of(_buffer(WRITTEN[name])) == name


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_is_recognised_by_its_checksum(kind):
    content = _buffer(lambda b: _tar(b, kind))
    assert signature_of(content) == "a tar archive"
    old = bytearray(content[:512])  # before POSIX the magic was not there
    old[257:265], old[148:156] = bytes(8), b" " * 8
    old[148:156] = b"%06o\0 " % sum(old)
    assert signature_of(bytes(old)) == "a tar archive"


ORDINARY = [
    b"BM is the code of Bermuda", b"MZ, a Sega game", b"RIFF raff", b"PAR1 is a gene", b"PAR1\n",
    b"ORC\n", b"ORCs and elves", b"ID3 tags are", b"ARROW1", b"GGUF files", b"PACKED", b"MATLAB 5.0"
    b" was released", b"0707011 is a number", b"the ftyp box", b'12345678{"a": 1}', b"II* Corps",
    b"BZhello", b"caf\xe9", b"PK is a driver", b"\xef\xbb\xbftext", b"",
]  # fmt: skip


@pytest.mark.parametrize("text", ORDINARY)
def test_texts_that_begin_like_a_signature(text):
    assert signature_of(text) is None
    assert binary_by_statistics(text) is None


@given(st.text(st.characters(min_codepoint=32, blacklist_categories=["Cs"]), max_size=600))
def test_text_has_no_signature(text):
    content = b"x" + text.encode()
    assert signature_of(content) is None
    assert binary_by_statistics(content.replace(b"\x7f", b"")) is None


@given(st.binary(max_size=600))
def test_any_bytes_are_looked_at_without_an_error(content):
    for data in (content, content[:0], b"MZ" + content, b"RIFF" + content, b"PK\3\4" + content):
        signature_of(data)
        binary_by_statistics(data)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_encodings_are_named_without_a_byte_order_mark(encoding):
    for text in ("plain english text\n" * 20, "naïve café, Привет\n" * 20 + "and some more" * 90):
        expected = "UTF-16" if "16" in encoding else "UTF-32"
        assert binary_by_statistics(text.encode(encoding)) == expected
    assert signature_of("text".encode(encoding[:6])) == expected  # with a mark


@pytest.mark.parametrize("encoding", ["latin-1", "cp1251", "koi8-r", "gb18030", "shift-jis"])
def test_other_encodings_are_text(encoding):
    words = {"latin-1": "café ÿ", "cp1251": "я и Ёж", "koi8-r": "Ъ и Ч"}.get(encoding, "漢字 かな")
    content = (words + "\n").encode(encoding) * 300
    assert signature_of(content) is None and binary_by_statistics(content) is None


def test_shares_of_nul_and_control_bytes():
    text = b"some text\n" * 1000
    assert binary_by_statistics(text + b"\0" * 10) is None  # 0.1%
    assert binary_by_statistics(text + b"\0" * 11) == "binary data"
    assert binary_by_statistics(text + b"\1" * 500) is None  # less than 5%
    assert binary_by_statistics(text + b"\1" * 530) == "binary data"
    assert binary_by_statistics(b"N\bNA\bAM\bME\bE \x1b[1m\t\f\r\n" * 50) is None  # a man page
    assert binary_by_statistics(np.random.default_rng(0).bytes(5000)) == "binary data"
