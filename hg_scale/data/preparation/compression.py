"""Compressed files (gzip, xz, zstd, bzip2), recognised by their first bytes, read in blocks.

A file may hold several streams, one after the other, as `cat` or parallel compressors make them.
All are read, and an error anywhere in the file is reported, as `gzip -t`, `xz -t`, `zstd -t` and
`bzip2 -t` do; Python's own readers silently stop at what follows the first stream.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

_READ = 1 << 16  # compressed bytes read at a time
ZSTD_WINDOW_LOG = 31  # of `zstd --long=31`, the largest; memory is taken as a frame needs it


class Decompressor(Protocol):
    """One stream: the interface of bz2, lzma and compression.zstd."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """zlib's decompressor of one gzip member, with the interface of the others."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)


def _zstd() -> Any:
    from backports import zstd

    return zstd.ZstdDecompressor(
        options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG}
    )


@dataclass(frozen=True)
class Compression:
    """How a file is compressed. `padding`: zeros may follow a stream, in multiples of this."""

    name: str
    magic: bytes
    decompressor: Callable[[], Decompressor]
    padding: int | None = None


COMPRESSIONS = (
    Compression("gzip", b"\x1f\x8b\x08", _Gzip, padding=1),
    Compression("xz", b"\xfd7zXZ\x00", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), padding=4),
    Compression("zstd", b"\x28\xb5\x2f\xfd", _zstd),
    Compression("bzip2", b"BZh", bz2.BZ2Decompressor),
)


class DecompressionError(Exception):
    """A compressed file that is corrupt, cut short, or followed by something else."""


def compression_of(head: bytes) -> Compression | None:
    """The compression of a file that begins with `head` (at least 8 bytes, or the entire file)."""
    for compression in COMPRESSIONS:
        if head.startswith(compression.magic):
            # "BZh" may begin a text: the block size and the magic of a block follow.
            if compression.name == "bzip2" and not _is_bzip2(head):
                continue
            return compression
    if head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50:  # a skippable frame of zstd
        return COMPRESSIONS[2]
    return None


def _is_bzip2(head: bytes) -> bool:
    markers = (b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90")  # a block, the end
    return len(head) >= 10 and head[3] in b"123456789" and head[4:10] in markers


def decompressed(file: BinaryIO, compression: Compression, block: int) -> Iterator[bytes]:
    """The decompressed bytes of a file, in blocks of at most `block`.

    Raises DecompressionError where a stream is corrupt or cut short, or something else follows one.
    """
    data, number = file.read(_READ), 0
    while data:
        number += 1
        stream = compression.decompressor()
        try:
            while not stream.eof:
                if stream.needs_input and not data and not (data := file.read(_READ)):
                    raise DecompressionError("it is cut short")
                out = stream.decompress(data, block)
                data = b""
                if out:
                    yield out
        except (lzma.LZMAError, zlib.error, OSError, EOFError, ValueError) as error:
            raise DecompressionError(f"stream {number}: {error}") from None
        except Exception as error:  # zstd has an exception of its own
            if type(error).__name__ != "ZstdError":
                raise
            raise DecompressionError(f"stream {number}: {error}") from None
        data = _next_stream(file, stream.unused_data or file.read(_READ), compression, number)


def _next_stream(file: BinaryIO, data: bytes, compression: Compression, number: int) -> bytes:
    """What follows a stream, without padding: the beginning of the next one, or nothing."""
    zeros = 0
    while data:
        rest = data.lstrip(b"\0") if compression.padding else data
        zeros += len(data) - len(rest)
        if rest:
            while len(rest) < 16 and (more := file.read(_READ)):
                rest += more
            found = compression_of(rest)
            if found is not compression or (compression.padding and zeros % compression.padding):
                raise DecompressionError(
                    f"something other than {compression.name} follows stream {number}"
                )
            return rest
        data = file.read(_READ)
    if compression.padding and zeros % compression.padding:
        raise DecompressionError(f"the padding that follows stream {number} is cut short")
    return b""
