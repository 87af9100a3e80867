"""Which files of a folder are read, and which are left out and why."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.file_format import TABLES, format_of
from hg_scale.data.preparation.skipping import STOP, SkipLog

HIDDEN = "hidden (name begins with a dot)"
SIDE_FILE = "side file of another program"
UNREAD_IN_CACHE = "hub cache, read through snapshots/"
SECOND_LINK = "another link to a file that is read"
LINKED_FOLDER = "link to a folder, not followed"
NOT_REGULAR = "pipe, socket or device"
BY_PATTERN = "by --include and --exclude"

_SIDE_SUFFIXES = (
    ".crc", ".md5", ".sha1", ".sha256", ".sha512", ".sfv", ".asc", ".sig",
    ".tmp", ".partial", ".incomplete", ".crdownload", ".aria2", ".lock", ".swp",
)  # fmt: skip
_SIDE_NAMES = (
    "__pycache__", "__MACOSX", "CACHEDIR.TAG", "Thumbs.db", "desktop.ini", "lost+found",
    "md5sums.txt", "md5sum.txt", "checksums.txt", "sha256sums.txt",
)  # fmt: skip
_SUMS = re.compile(r"(MD5|SHA\d+|B2)SUMS?", re.IGNORECASE)
_SPARK = re.compile(r"_[^_.][^.]*")  # _SUCCESS, _metadata, _committed_12; not __init__.py
_SPARK_FOLDERS = re.compile(
    r"_(delta_log|temporary|spark_metadata|symlink_format_manifest|change_data|logs)|_tmp_.*"
)  # not _posts, _sources
_NAMES_THEM = re.compile(r"(^|/)[._]")  # a pattern that asks for hidden and side files
_SHOWN = 3  # names per reason


class LeftOut:
    """The files and folders of the inputs that are not read, by reason."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count a file or folder; the first names are kept."""
        self.counts[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < _SHOWN:
            names.append(name)

    def by_default(self) -> dict[str, int]:
        """Return the counts of what only our own rules about names leave out."""
        ours = (HIDDEN, SIDE_FILE, UNREAD_IN_CACHE, SECOND_LINK)
        return {reason: self.counts[reason] for reason in ours if self.counts[reason]}

    def lines(self) -> Iterator[str]:
        """Yield a line per reason."""
        for reason, count in self.counts.items():
            names = ", ".join(self.names[reason])
            more = ", ..." if count > len(self.names[reason]) else ""
            yield f"  left out {count:,}: {reason} ({names}{more})"


def find_files(
    folder: Path,
    include: Sequence[str],
    exclude: Sequence[str],
    log: SkipLog = STOP,
    left_out: LeftOut | None = None,
) -> list[str]:
    """Return the files below `folder` as relative POSIX paths, sorted by their bytes.

    A pattern is matched with the file's name and with its relative path, where `*` also spans
    `/`. Links to folders are not followed. Hidden files, side files and the blobs of a hub cache
    are left out, unless a pattern of `include` asks for such names (`.*`, `_*`, `*.crc`).
    `left_out` receives what is not read, `log` folders that cannot be read and broken links. Raises
    DataError where no file is left.
    """
    left_out = LeftOut() if left_out is None else left_out
    walk = _Walk(folder, include, exclude, log, left_out)
    found = sorted(walk.files(), key=os.fsencode)
    if not found:
        ours = "; ".join(line.strip() for line in left_out.lines() if BY_PATTERN not in line)
        raise DataError(
            f"{folder}: no file matches --include {' '.join(include)}"
            + (f" without --exclude {' '.join(exclude)}" if exclude else "")
            + (f" ({ours})" if ours else "")
            + "; check the patterns and the folder"
        )
    return found


class _Walk:
    """One walk through a folder."""

    def __init__(
        self,
        folder: Path,
        include: Sequence[str],
        exclude: Sequence[str],
        log: SkipLog,
        left_out: LeftOut,
    ) -> None:
        self._folder, self._include, self._exclude = folder, include, exclude
        self._log, self._left_out = log, left_out
        self._asking = [p for p in include if _NAMES_THEM.search(p) or _is_side_suffix(p)]
        self._caches: list[Path] = []  # snapshots/ of hub caches
        self._blobs: set[Path] = set()  # files in them, with all links followed

    def files(self) -> Iterator[str]:
        for root, folders, names in os.walk(self._folder, onerror=self._refuse):
            where = Path(root)
            self._choose_folders(where, folders)
            in_cache = any(where.is_relative_to(cache) for cache in self._caches)
            in_hub = any(f.startswith(("models--", "datasets--", "spaces--")) for f in folders)
            for name in sorted(names):
                if self._reads(where / name, in_cache, in_hub):
                    yield self._relative(where / name)

    def _choose_folders(self, where: Path, folders: list[str]) -> None:
        """Remove the folders that are not entered."""
        cache, kept = "snapshots" in folders and "blobs" in folders, []
        if cache:
            self._caches.append(where / "snapshots")
        for name in sorted(folders):
            path = where / name
            reason = None if self._asking else _folder_reason(name)
            if path.is_symlink():
                self._left_out.add(LINKED_FOLDER, f"{self._relative(path)} -> {os.readlink(path)}")
            elif cache and name != "snapshots":
                self._left_out.add(UNREAD_IN_CACHE, f"{self._relative(path)}/")
            elif reason:
                self._left_out.add(reason, f"{self._relative(path)}/")
            else:
                kept.append(name)
        folders[:] = kept

    def _reads(self, path: Path, in_cache: bool, in_hub: bool) -> bool:
        """Return whether a file is read, or count it."""
        relative = self._relative(path)
        reason: str | None = None
        if not matches_any(relative, self._include) or matches_any(relative, self._exclude):
            reason = BY_PATTERN
        elif not matches_any(relative, self._asking):
            folders = PurePosixPath(relative).parts[:-1]  # entered for another pattern's sake
            reason = next(filter(None, map(_folder_reason, folders)), None) or _reason(path)
            if in_hub and path.name == "version.txt":
                reason = UNREAD_IN_CACHE
        if reason is None:
            if path.is_symlink() and not path.exists():
                problem = f"{path}: links to {os.readlink(path)!r}, which does not exist"
                remedy = "download it, or leave the link out with --exclude"
                self._log.skip(path, "file", None, f"{problem}; {remedy}")
                return False
            if not path.is_file():
                reason = NOT_REGULAR
            elif in_cache and self._is_second_link(path):
                reason = SECOND_LINK
        if reason is not None:
            self._left_out.add(reason, relative)
        return reason is None

    def _is_second_link(self, path: Path) -> bool:
        blob = path.resolve()
        known = blob in self._blobs
        self._blobs.add(blob)
        return known

    def _refuse(self, error: OSError) -> None:
        reason = f"{error.filename}: cannot be read ({error.strerror}); make it readable"
        self._log.skip(error.filename, "file", None, reason)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def _reason(path: Path) -> str | None:
    """Return why a file is left out by its name; None: it is read."""
    name = path.name
    if name.startswith("."):
        return HIDDEN
    if _SPARK.fullmatch(name) or _SUMS.fullmatch(name) or name in _SIDE_NAMES or name[-1] == "~":
        return SIDE_FILE
    if not _is_side_suffix(name):
        return None
    # The contents win: a table under a temporary name is one.
    is_table = name.lower().endswith(".tmp") and path.is_file() and format_of(path) in TABLES
    return None if is_table else SIDE_FILE


def _folder_reason(name: str) -> str | None:
    """Return why a folder is not entered; None: it is."""
    if name.startswith("."):
        return HIDDEN
    return SIDE_FILE if name in _SIDE_NAMES or _SPARK_FOLDERS.fullmatch(name) else None


def _is_side_suffix(name: str) -> bool:
    return name.lower().endswith(_SIDE_SUFFIXES)


def matches_any(path: str, patterns: Sequence[str]) -> bool:
    """Whether a relative path, or the file's name, matches one of the patterns."""
    name = path.rpartition("/")[2]
    return any(fnmatchcase(name, p) or fnmatchcase(path, p) for p in patterns)
