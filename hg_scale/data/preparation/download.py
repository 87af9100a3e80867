"""Fetching a corpus over https: gone on with where it broke off, compared with a checksum."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hg_scale import __version__
from hg_scale.data.errors import DataError
from hg_scale.data.preparation.shard_writer import PARTIAL, commit, partial_path
from hg_scale.data.progress import ProgressBar

_BLOCK = 1 << 18
_TRIES = 5  # in a row without a byte more
_PAUSE = 1.0  # seconds before the second try without one, doubled for each further one
_TIMEOUT = 60.0  # seconds without a byte
_FULL = errno.ENOSPC, errno.EDQUOT


@dataclass(frozen=True)
class Download:
    """A corpus to fetch: one file in a zip archive."""

    name: str
    url: str
    size: int  # bytes of the file, unpacked
    algorithm: Literal["sha256", "md5"]
    digest: str  # of the file, unpacked


CORPORA = {
    corpus.name: corpus
    for corpus in (
        Download(
            "enwik8", "https://mattmahoney.net/dc/enwik8.zip", 100_000_000, "sha256",
            "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
        ),
        Download(
            "text8", "https://mattmahoney.net/dc/text8.zip", 100_000_000, "md5",
            "3bea1919949baf155f99411df5fada7e",
        ),
    )
}  # fmt: skip


def fetch(corpus: Download, folder: Path, progress: ProgressBar) -> tuple[Path, bool]:
    """The corpus in a folder, and whether anything had to be fetched or unpacked.

    An archive or a file that was placed there by hand is taken. Raises DataError, one line, where
    the network refuses or what came is not the corpus.
    """
    target, archive = folder / corpus.name, folder / f"{corpus.name}.zip"
    folder.mkdir(parents=True, exist_ok=True)
    if target.exists():
        _check(target, corpus, progress)
        return target, False
    if not archive.exists():
        _download(corpus, archive, progress)
    _unpack(archive, corpus, target, progress)
    archive.unlink()
    return target, True


def _download(corpus: Download, archive: Path, progress: ProgressBar) -> None:
    """Fetch the archive, from where an earlier try ended."""
    partial = archive.with_name(archive.name + PARTIAL)
    tries, pause = 0, _PAUSE
    while True:
        before = _length(partial)
        try:
            _transfer(corpus.url, partial, progress)
            break
        except ValueError as error:  # not a URL
            raise DataError(_refused(error, corpus, archive)) from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                raise
            tries = 1 if _length(partial) > before else tries + 1
            code = error.code if isinstance(error, urllib.error.HTTPError) else 500
            if code == 416 and before:  # there is no such part of the file
                partial.unlink()
                continue
            if code < 500 or tries >= _TRIES or not _length(partial):
                raise DataError(_refused(error, corpus, archive)) from None
            if tries > 1:
                time.sleep(pause)
                pause *= 2
    commit(partial, archive)


def _transfer(url: str, partial: Path, progress: ProgressBar) -> None:
    """One try: append what is missing. Raises OSError or HTTPException where it ends early."""
    begin, version = _length(partial), partial.with_name(partial.name + ".version")
    headers = {"User-Agent": f"hg_scale/{__version__}"}
    if begin and version.exists():  # only if it is still the same file
        headers |= {"Range": f"bytes={begin}-", "If-Range": version.read_text()}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        goes_on = answer.status == 206
        if goes_on and not answer.headers.get("Content-Range", "").startswith(f"bytes {begin}-"):
            version.unlink()
            raise http.client.HTTPException("the server sent another part than was asked for")
        tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified")
        if tag and not tag.startswith("W/"):
            version.write_text(tag)
        else:
            version.unlink(missing_ok=True)
        begin = begin if goes_on else 0
        length = int(answer.headers.get("Content-Length", 0))
        progress.begin(f"fetching {partial.name.removesuffix(PARTIAL)}", begin + length, begin)
        left = length
        with partial.open("ab" if goes_on else "wb") as file:
            while block := answer.read(_BLOCK):
                file.write(block)
                left -= len(block)
                progress.advance(len(block))
            file.flush()
            os.fsync(file.fileno())
        if length and left:
            raise http.client.IncompleteRead(b"", left)
    version.unlink(missing_ok=True)


def _unpack(archive: Path, corpus: Download, target: Path, progress: ProgressBar) -> None:
    partial, digest = partial_path(target), hashlib.new(corpus.algorithm)
    progress.begin(f"unpacking {archive.name}", corpus.size)
    try:
        with (
            zipfile.ZipFile(archive) as zipped,
            zipped.open(corpus.name) as packed,
            partial.open("wb") as file,
        ):
            while block := packed.read(_BLOCK):
                file.write(block)
                digest.update(block)
                progress.advance(len(block))
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != corpus.digest:
            raise DataError(_wrong(archive, corpus, digest.hexdigest()))
        commit(partial, target)
    except (zipfile.BadZipFile, KeyError, EOFError, RuntimeError, zlib.error) as error:
        raise DataError(
            f"{archive}: is not the archive of {corpus.name} ({error}); remove it and start again"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def _check(target: Path, corpus: Download, progress: ProgressBar) -> None:
    digest = hashlib.new(corpus.algorithm)
    progress.begin(f"checking {target.name}", target.stat().st_size)
    with target.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            progress.advance(len(block))
    if digest.hexdigest() != corpus.digest:
        raise DataError(_wrong(target, corpus, digest.hexdigest()))


def _wrong(path: Path, corpus: Download, digest: str) -> str:
    return (
        f"{path}: its text has {corpus.algorithm} {digest}, {corpus.name} has {corpus.digest}; "
        "remove it and start again"
    )


def _refused(error: Exception, corpus: Download, archive: Path) -> str:
    reason = getattr(error, "reason", None) or error
    return (
        f"{corpus.url} cannot be fetched ({reason}); where there is no network, place "
        f"{archive.name} or {corpus.name} in {archive.parent} by hand and start again"
    )


def _length(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0
