"""Compressed files: every stream is read, and an error anywhere is reported."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from hg_scale.data.preparation.compression import DecompressionError, compression_of, decompressed

PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "zstd": zstd.compress,
    "bzip2": bz2.compress,
}
TEXT = b"".join(b"line %d of a text\n" % n for n in range(20_000))


def unpack(data: bytes, block: int = 1 << 16) -> bytes:
    compression = compression_of(data[:64])
    assert compression
    blocks = list(decompressed(io.BytesIO(data), compression, block))
    assert all(0 < len(part) <= block for part in blocks)
    return b"".join(blocks)


@pytest.mark.parametrize("name", PACK)
@given(parts=st.lists(st.binary(max_size=300), min_size=1, max_size=4), block=st.integers(1, 400))
def test_all_streams_are_read(name: str, parts: list[bytes], block: int) -> None:
    data = b"".join(map(PACK[name], parts))
    assert compression_of(data).name == name
    assert unpack(data, block) == b"".join(parts)


@pytest.mark.parametrize("name", PACK)
def test_a_file_cut_short_is_reported(name: str) -> None:
    data = PACK[name](TEXT) * 2
    half = len(data) // 2
    for cut in (20, half // 2, half - 1, half + 5, half + half // 2, len(data) - 1):
        with pytest.raises(DecompressionError):
            unpack(data[:cut])


@pytest.mark.parametrize("name", PACK)
def test_corruption_in_a_later_stream_is_reported(name: str) -> None:
    pack = PACK[name]
    if name == "zstd":  # the command line tool writes checksums, the library does not
        options = {zstd.CompressionParameter.checksum_flag: 1}
        pack = lambda text: zstd.compress(text, options=options)  # noqa: E731
    first, second = pack(b"the first"), bytearray(pack(TEXT))
    second[len(second) // 2] ^= 0x55
    with pytest.raises(DecompressionError, match="stream [12]"):
        unpack(first + second)


@pytest.mark.parametrize("name", PACK)
def test_something_else_after_a_stream_is_reported(name: str) -> None:
    for rest in (b"plain text", b"\1", PACK["gzip" if name != "gzip" else "xz"](b"x")):
        with pytest.raises(DecompressionError, match="something other than"):
            unpack(PACK[name](TEXT) + rest)


def test_padding_between_streams() -> None:
    xz, gz = lzma.compress(b"one"), gzip.compress(b"one")
    assert unpack(xz + bytes(4) + xz + bytes(8)) == b"oneone"
    assert unpack(gz + bytes(3) + gz + bytes(500)) == b"oneone"  # as of tapes
    for data in (xz + bytes(3), xz + bytes(5) + xz, zstd.compress(b"one") + bytes(4)):
        with pytest.raises(DecompressionError):
            unpack(data)


def test_long_windows_of_zstd() -> None:
    options = {
        zstd.CompressionParameter.window_log: 30,
        zstd.CompressionParameter.enable_long_distance_matching: 1,
        zstd.CompressionParameter.content_size_flag: 0,
    }
    packer = zstd.ZstdCompressor(options=options)
    data = packer.compress(TEXT) + packer.flush()
    assert unpack(data) == TEXT


@pytest.mark.parametrize("text", [b"", b"BZh", b"BZhang wrote", b"\x1f", b"a text", b"BZh9"])
def test_texts_are_not_packed(text: bytes) -> None:
    assert compression_of(text) is None
