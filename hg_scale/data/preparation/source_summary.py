"""What was read of a corpus, by format, and what was left out, for the user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.corpus import SourceFile, list_files, refuse_empty
from hg_scale.data.preparation.file_format import FileFormat, inspect_files, is_never_empty
from hg_scale.data.preparation.folders import LeftOut
from hg_scale.data.preparation.skipping import SkipLog

_NAMES: dict[FileFormat | None, str] = {
    "text": "plain text", "lines": "JSON lines", "csv": "CSV", "tsv": "TSV", "parquet": "Parquet",
    "arrow file": "Arrow", "arrow stream": "Arrow stream", None: "as they are",
}  # fmt: skip


class SourceSummary:
    """Counts of the files that are read and of what is left out."""

    def __init__(self) -> None:
        self.left_out = LeftOut()
        self._files: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()

    def add(self, kind: FileFormat | None, compressed: bool, size: int) -> None:
        """Count a file that is read; `kind` is None where its bytes are taken as they are."""
        name = _NAMES[kind] + (", compressed" if compressed else "")
        self._files[name] += 1
        self._bytes[name] += size

    def lines(self) -> Iterator[str]:
        """Yield the lines to print."""
        for name, count in sorted(self._files.items()):
            files = "file" if count == 1 else "files"
            yield f"  read {count:,} {files}, {self._bytes[name]:,} bytes: {name}"
        yield from self.left_out.lines()


def survey_files(
    inputs: Sequence[Path],
    include: Sequence[str],
    exclude: Sequence[str],
    summary: SourceSummary,
    log: SkipLog,
    *,
    only_text: bool = False,
    as_they_are: bool | None = False,
) -> list[SourceFile]:
    """Return the files of the inputs that are read, all of them text or tables, and count them.

    Files that are binary, or empty though their format never is, go to `log`, before any document
    is read. `only_text`: so do tables. `as_they_are`: read files of every kind; None: the command
    has no such option. Raises DataError where a file is in two of the inputs, or none is left.
    """
    files = list_files(inputs, include, exclude, log, summary.left_out)
    if as_they_are:
        for file in files:
            summary.add(None, False, file.size)
        return files
    contents = inspect_files(
        [Path(file.path) for file in files],
        log,
        only_text=only_text,
        option=as_they_are is not None,
    )
    found = {file: contents[Path(file.path)] for file in files if Path(file.path) in contents}
    never_empty = {file for file, kind in found.items() if is_never_empty(Path(file.path), kind)}
    files = refuse_empty(list(found), never_empty, log)
    if not files:
        raise DataError(f"--input {inputs[0]}: contains no file that can be read{log.summary()}")
    for file in files:
        kind = found[file]
        summary.add("text" if only_text else kind.format, kind.compressed, file.size)
    return files
