"""What was read of a corpus, by format, and what was left out, for the user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from hg_scale.data.preparation.corpus import SourceFile, list_files, refuse_empty
from hg_scale.data.preparation.file_format import FileFormat, inspect_files, is_never_empty
from hg_scale.data.preparation.folders import LeftOut

_NAMES: dict[FileFormat | None, str] = {
    "text": "plain text", "lines": "JSON lines", "csv": "CSV", "tsv": "TSV", "parquet": "Parquet",
    "arrow file": "Arrow", "arrow stream": "Arrow stream", None: "as they are",
}  # fmt: skip


class SourceSummary:
    """Counts of the files that are read and of what is left out."""

    def __init__(self) -> None:
        self.left_out = LeftOut()
        self.nulls = 0  # rows without a text
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
            yield f"read {count:,} {files}, {self._bytes[name]:,} bytes: {name}"
        if self.nulls:
            yield f"left out {self.nulls:,}: null, not a text"
        yield from self.left_out.lines()


def survey_files(
    inputs: Sequence[Path],
    include: Sequence[str],
    exclude: Sequence[str],
    summary: SourceSummary,
    *,
    only_text: bool = False,
    as_they_are: bool | None = False,
) -> list[SourceFile]:
    """Return the files of the inputs that are read, all of them text or tables, and count them.

    `only_text`: refuse tables. `as_they_are`: read files of every kind; None: the command has no
    such option. Raises DataError, before any document is read, where a file is binary, empty though
    its format never is, or in two of the inputs.
    """
    files = list_files(inputs, include, exclude, summary.left_out)
    if as_they_are:
        for file in files:
            summary.add(None, False, file.size)
        return files
    paths = [Path(file.path) for file in files]
    contents = inspect_files(paths, only_text=only_text, option=as_they_are is not None)
    found = list(zip(files, paths, contents, strict=True))
    refuse_empty([file for file, path, content in found if is_never_empty(path, content)])
    for file, _, content in found:
        summary.add("text" if only_text else content.format, content.compressed, file.size)
    return files
