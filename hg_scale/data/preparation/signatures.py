"""What bytes are, by the first of them and by statistics: a format's name, or text.

Only these names matter to users; what is not recognised and does not look like text is called
binary data. Two or three letters alone are no signature: a text may begin with them.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable

from hg_scale.data.preparation.compression import compression_of

HEAD_BYTES = 1 << 16  # of the first sample of a file; all signatures are in it
SAMPLE_BYTES = 1 << 16  # of the samples in the middle and at the end

PARQUET, ARROW_FILE, ARROW_STREAM = "Parquet", "an Arrow file", "an Arrow stream"

_MAX_NUL_SHARE = 0.001
_MAX_CONTROL_SHARE = 0.05
_CONTROL = bytes({*range(1, 32), 127} - {7, 8, 9, 10, 11, 12, 13, 27})  # not BEL to CR, ESC
_MIN_UTF16_NULS = 0.2  # of the bytes at even or at odd positions
_MAX_HEADER = 100_000_000  # bytes of a header of safetensors, as its library permits

_UTF_32 = ((b"\xff\xfe\x00\x00", "UTF-32"), (b"\x00\x00\xfe\xff", "UTF-32"))
_UTF_16 = ((b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))

_AT_START: tuple[tuple[bytes, str], ...] = (
    (b"Obj\x01", "Avro"),
    (b"SEQ\x06", "a Hadoop sequence file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"CDF\x01", "NetCDF"),
    (b"CDF\x02", "NetCDF"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"PK\x07\x08", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"!<arch>\n", "an ar archive"),
    (b"\xed\xab\xee\xdb", "an RPM package"),
    (b"MSCF\x00\x00\x00\x00", "a cabinet archive"),
    (b"xar!\x00", "a xar archive"),
    (b"\x04\x22\x4d\x18", "lz4 data"),
    (b"\x02\x21\x4c\x18", "lz4 data"),
    (b"LZIP\x01", "lzip data"),
    (b"\x89LZO\x00\r\n\x1a\n", "lzop data"),
    (b"\x5d\x00\x00", "lzma data"),
    (b"\x1f\x9d", "compress (.Z) data"),
    (b"\x1f\xa0", "compress (.Z) data"),
    (b"\x1f\x1e", "pack (.z) data"),
    (b"\xff\x06\x00\x00sNaPpY", "snappy data"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF87a", "a GIF image"),
    (b"GIF89a", "a GIF image"),
    (b"II*\x00", "a TIFF image"),
    (b"MM\x00*", "a TIFF image"),
    (b"II+\x00", "a TIFF image"),
    (b"MM\x00+", "a TIFF image"),
    (b"8BPS\x00", "a Photoshop image"),
    (b"\x00\x00\x01\x00", "an icon"),
    (b"\x00\x00\x00\x0cjP  \r\n", "a JPEG 2000 image"),
    (b"\x00\x00\x00\x0cJXL \r\n", "a JPEG XL image"),
    (b"%PDF-", "a PDF document"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Microsoft Office document"),
    (b"AT&TFORM", "a DjVu document"),
    (b"\x7fELF", "an ELF program"),
    (b"\xca\xfe\xba\xbe", "a Java class or a macOS program"),
    (b"\xcf\xfa\xed\xfe", "a macOS program"),
    (b"\xfe\xed\xfa\xcf", "a macOS program"),
    (b"\x00asm", "WebAssembly"),
    (b"OggS\x00", "an Ogg file"),
    (b"fLaC", "FLAC audio"),
    (b"MThd\x00\x00\x00\x06", "MIDI"),
    (b"\x1a\x45\xdf\xa3", "Matroska or WebM video"),
    (b"wOFF\x00", "a font"),
    (b"wOF2\x00", "a font"),
    (b"OTTO\x00", "a font"),
    (b"\x00\x01\x00\x00\x00", "a font"),
    (b"\xde\x12\x04\x95", "a gettext catalog"),
    (b"DIRC\x00\x00\x00", "a Git index"),
    (b"PACK\x00\x00\x00", "a Git pack"),
    (b"\x99\x01\x0d\x04", "an OpenPGP key"),
)  # fmt: skip

_WORDS: tuple[tuple[bytes, str], ...] = (
    (b"PAR1", PARQUET), (b"PARE", "encrypted Parquet"), (b"ARROW1", ARROW_FILE),
    (b"FEA1", "Feather version 1"), (b"GGUF", "GGUF weights"), (b"ORC", "ORC"),
)  # fmt: skip
"""A text may begin with these, but then no control characters follow."""

_RIFF = {b"WEBP": "a WebP image", b"WAVE": "WAV audio", b"AVI ": "AVI video"}
_FTYP = {b"heic": "a HEIC image", b"heix": "a HEIC image", b"avif": "an AVIF image"}
_PICKLE = re.compile(rb"\x80[\x02-\x05][\x95\x7d\x5d\x28\x63\x4b\x58\x8a\x4a\x80\x8c\x29\x4e\x4d]")


def _riff(head: bytes) -> str | None:
    return _RIFF.get(head[8:12]) if head[:4] == b"RIFF" else None


def _isobmff(head: bytes) -> str | None:
    found = head[:3] == b"\0\0\0" and head[4:8] == b"ftyp"
    return _FTYP.get(head[8:12], "MP4 video or audio") if found else None


def _aiff(head: bytes) -> str | None:
    found = head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC")
    return "AIFF audio" if found else None


def _zip(head: bytes) -> str | None:
    if head[:4] != b"PK\x03\x04":
        return None
    member = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if member.endswith((b"/data.pkl", b"/version", b"/.format_version")):
        return "a PyTorch checkpoint"
    return "a NumPy .npz archive" if member.endswith(b".npy") else "a zip archive"


def _tar(head: bytes) -> str | None:
    try:  # the checksum of the header is right, also without the word ustar
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return "a tar archive" if head[257:262] == b"ustar" else None
    return "a tar archive"


def _arrow_stream(head: bytes) -> str | None:
    size = int.from_bytes(head[4:8], "little", signed=True)
    return ARROW_STREAM if head[:4] == b"\xff\xff\xff\xff" and 0 < size < 1 << 28 else None


def _safetensors(head: bytes) -> str | None:
    size = int.from_bytes(head[:8], "little")
    return "safetensors weights" if head[8:10] == b'{"' and 2 <= size <= _MAX_HEADER else None


def _pickle(head: bytes) -> str | None:
    return "a Python pickle" if _PICKLE.match(head) else None


def _bmp(head: bytes) -> str | None:
    header = int.from_bytes(head[14:18], "little")
    found = head[:2] == b"BM" and head[6:10] == b"\0\0\0\0" and header in (12, 40, 52, 56, 108, 124)
    return "a BMP image" if found else None


def _mp3(head: bytes) -> str | None:
    return "MP3 audio" if head[:3] == b"ID3" and 2 <= head[3] <= 4 and head[4] < 0xFF else None


def _windows_program(head: bytes) -> str | None:
    at = int.from_bytes(head[60:64], "little")
    found = head[:2] == b"MZ" and head[at : at + 4] == b"PE\0\0"
    return "a Windows program" if found else None


def _word(head: bytes) -> str | None:
    for word, name in _WORDS:
        following = head[len(word) : len(word) + 12]
        if head.startswith(word) and following.translate(None, _CONTROL + b"\0") != following:
            return name
    return None


def _cpio(head: bytes) -> str | None:
    return "a cpio archive" if re.match(rb"07070[12][0-9A-Fa-f]{104}", head) else None


def _python_code(head: bytes) -> str | None:
    found = head[2:4] == b"\r\n" and head[1] in (0x0C, 0x0D, 0x0E) and head[4:7] == b"\0\0\0"
    return "compiled Python" if found else None


def _matlab(head: bytes) -> str | None:
    found = head[:10] == b"MATLAB 5.0" and head[126:128] in (b"IM", b"MI")
    return "a MATLAB file" if found else None


_CHECKS: tuple[Callable[[bytes], str | None], ...] = (
    _zip, _tar, _arrow_stream, _safetensors, _pickle, _riff, _isobmff, _aiff, _bmp,
    _windows_program, _python_code, _matlab, _cpio,
)  # fmt: skip


def signature_of(head: bytes) -> str | None:
    """Return the name of the format that begins with `head`, other than text; None: unknown."""
    if (compression := compression_of(head)) is not None:
        return f"{compression.name} data"
    for magic, name in (*_UTF_32, *_UTF_16, *_AT_START):
        if head.startswith(magic):
            return name
    if (word := _word(head)) is not None or len(head) < 10:
        return word
    if (audio := _mp3(head)) is not None:
        return audio
    return next(filter(None, (check(head) for check in _CHECKS)), None)


def binary_by_statistics(sample: bytes) -> str | None:
    """Return what a sample of a file is if it is not text: UTF-16, UTF-32 or binary data.

    Text may be in any encoding that keeps ASCII, so bytes above 127 say nothing.
    """
    if not sample:
        return None
    nuls = sample.count(0)
    controls = len(sample) - nuls - len(sample.translate(None, _CONTROL + b"\0"))
    if nuls <= _MAX_NUL_SHARE * len(sample):
        return "binary data" if controls > _MAX_CONTROL_SHARE * len(sample) else None
    return _wide_encoding(sample) or "binary data"


def _wide_encoding(sample: bytes) -> str | None:
    """Return UTF-16 or UTF-32, by the NULs beside the bytes of ASCII characters."""
    if len(sample) < 8:
        return None
    shares = [part.count(0) / len(part) for part in (sample[k::4] for k in range(4))]
    # UTF-32 has three NULs beside each ASCII character, UTF-16 one.
    for order in (shares, shares[::-1]):
        if min(order[2:]) > 0.9 and order[1] > _MIN_UTF16_NULS and order[0] < 0.05:
            return "UTF-32"
        if min(order[1::2]) > _MIN_UTF16_NULS and max(order[::2]) < 0.05:
            return "UTF-16"
    return None
