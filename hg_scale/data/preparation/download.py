"""Download a corpus with pooch, unpack it and compare its checksum.

pooch retries a download that broke off but does not resume it; the archives have only 35 MB.
"""

from __future__ import annotations

import re
import shutil
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hg_scale import __version__
from hg_scale.atomic_write import durable_file
from hg_scale.data.errors import DataError
from hg_scale.data.progress import ProgressBar
from hg_scale.data.urls import http_reason, shown_url

_RETRIES = 2
_TIMEOUT = 60.0  # seconds without a byte


@dataclass(frozen=True)
class CorpusArchive:
    """A corpus to download: one file in a zip archive."""

    name: str
    url: str
    algorithm: Literal["sha256", "md5"]
    digest: str  # of the unpacked file


CORPORA = {
    corpus.name: corpus
    for corpus in (
        CorpusArchive(
            "enwik8", "https://mattmahoney.net/dc/enwik8.zip", "sha256",
            "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
        ),
        CorpusArchive(
            "text8", "https://mattmahoney.net/dc/text8.zip", "md5",
            "3bea1919949baf155f99411df5fada7e",
        ),
    )
}  # fmt: skip


class _DownloadProgress:
    """Shows pooch's progress on our bar; pooch sets `total` and calls the methods."""

    def __init__(self, what: str, progress: ProgressBar) -> None:
        self._what, self._progress, self._total = what, progress, 0

    @property
    def total(self) -> int:
        return self._total

    @total.setter
    def total(self, total: int) -> None:
        self._total = total
        self._progress.begin(self._what, total)

    def update(self, count: int) -> None:
        self._progress.advance(count)

    def reset(self) -> None:
        self._progress.update(0)

    def close(self) -> None:
        pass


def fetch(corpus: CorpusArchive, folder: Path, progress: ProgressBar) -> tuple[Path, bool]:
    """Return the corpus's file in a folder, and whether it had to be downloaded or unpacked.

    An archive or a file that the user put there is used. Raises DataError where the download fails
    or the content is not the corpus.
    """
    target, archive = folder / corpus.name, folder / f"{corpus.name}.zip"
    folder.mkdir(parents=True, exist_ok=True)
    if target.exists():
        _check(target, corpus, target)
        return target, False
    if not archive.exists():
        _download(corpus, archive, progress)
    _unpack(archive, corpus, target)
    archive.unlink()
    return target, True


def _download(corpus: CorpusArchive, archive: Path, progress: ProgressBar) -> None:
    import pooch
    from requests import RequestException

    pooch.get_logger().setLevel("WARNING")
    bar = _DownloadProgress(f"downloading {archive.name}", progress)
    headers = {"User-Agent": f"hg_scale/{__version__}"}
    files = pooch.create(
        path=archive.parent,
        base_url="",
        registry={archive.name: None},  # the digests are those of the unpacked files
        urls={archive.name: corpus.url},
        retry_if_failed=_RETRIES,
    )
    try:
        files.fetch(
            archive.name,
            downloader=pooch.HTTPDownloader(progressbar=bar, timeout=_TIMEOUT, headers=headers),
        )
    except (RequestException, ValueError) as error:  # ValueError: not a URL
        raise DataError(
            f"{shown_url(corpus.url)} cannot be downloaded ({_reason(error)}); without a "
            f"network, put {archive.name} or {corpus.name} into {archive.parent} and start again"
        ) from None


def _reason(error: Exception) -> str:
    """Return the HTTP status, or the error of the connection, as one line."""
    response = getattr(error, "response", None)
    if response is not None:
        return http_reason(response.status_code)
    reason = getattr(error.args[0], "reason", error) if error.args else error
    text = " ".join(str(reason).split())
    return shown_url(re.sub(r"^.*object at 0x\w+>: |^\w+\([^)]*\): ", "", text))


def _unpack(archive: Path, corpus: CorpusArchive, target: Path) -> None:
    try:
        with (
            zipfile.ZipFile(archive) as zipped,
            zipped.open(corpus.name) as packed,
            durable_file(target) as file,
        ):
            shutil.copyfileobj(packed, file)
            file.flush()
            _check(Path(file.name), corpus, archive)
    except (zipfile.BadZipFile, KeyError, EOFError, RuntimeError, zlib.error) as error:
        raise DataError(
            f"{archive}: is not the archive of {corpus.name} ({error}); remove it and start again"
        ) from None


def _check(text: Path, corpus: CorpusArchive, source: Path) -> None:
    """Raise DataError, naming `source`, where the unpacked text is another."""
    import pooch

    digest = pooch.file_hash(text, alg=corpus.algorithm)
    if digest != corpus.digest:
        raise DataError(
            f"{source}: its text has {corpus.algorithm} {digest}, {corpus.name} has "
            f"{corpus.digest}; remove it and start again"
        )
