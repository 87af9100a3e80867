"""An image corpus: picture files and NumPy arrays, read as sequences of sub-pixels.

An image is a document of H x W x C bytes in row-major order: the channels of a pixel are adjacent
(red, green, blue; or one for gray). Images are never resized, cropped or converted with loss.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.batches import group_documents
from hg_scale.data.preparation.corpus import (
    DocumentKeys,
    KeyedBatch,
    ReadTask,
    Segment,
    SourceFile,
    check_folders,
    fingerprint,
    list_files,
    make_tasks,
    refuse_empty,
)
from hg_scale.data.preparation.folders import BY_PATTERN, LeftOut, matches_any
from hg_scale.data.preparation.image_arrays import (
    ARRAYS,
    ArrayOptions,
    array_shape,
    is_npy,
    read_array,
)
from hg_scale.data.preparation.image_files import (
    PICTURES,
    ExpectedShape,
    ImageShape,
    Picture,
    read_picture,
)
from hg_scale.data.preparation.skipping import STOP, SkipLog
from hg_scale.data.preparation.sources import Advance
from hg_scale.data.tokenizer import ByteTokenizer

TURNED = "images were turned upright, as their EXIF orientation says"


@dataclass
class ImageCorpus:
    """Images of equal size, shuffled; split by their content, or by their folder."""

    inputs: tuple[Path, ...]
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    fractions: tuple[float, ...] | None = (0.9, 0.05, 0.05)  # None: by folder
    seed: int = 0
    array: ArrayOptions = ArrayOptions()

    tokenizer: ByteTokenizer = field(default_factory=lambda: ByteTokenizer(documents=False))
    files: list[SourceFile] = field(default_factory=list, init=False)
    shape: ImageShape = field(default=(0, 0, 0), init=False)
    others: Counter[str] = field(default_factory=Counter, init=False)
    left_out: LeftOut = field(default_factory=LeftOut, init=False)

    @property
    def document_tokens(self) -> int:
        """Sub-pixels per image."""
        return math.prod(self.shape)

    def survey(self, log: SkipLog = STOP) -> dict[str, Any]:
        """Return the files, and the shape of the first image, which all images must have.

        Files of folders that are no images are not read; `others` counts them by suffix.
        """
        everything = self.include == ("*",)
        include = _IMAGE_PATTERNS if everything else self.include
        self.others = self._count_others() if everything else Counter()
        self.left_out = LeftOut()
        try:
            files = list_files(self.inputs, include, self.exclude, log, self.left_out)
        except DataError as error:
            raise DataError(f"{error}{self._describe_others()}") from None
        for file in files:
            if Path(file.path).suffix.lower() not in PICTURES + ARRAYS:
                raise DataError(
                    f"{file.path}: not an image; expected {', '.join(PICTURES + ARRAYS)}: leave it "
                    "out with --exclude"
                )
        files = refuse_empty(files, files, log)
        if self.fractions is None:
            check_folders(files)
        files, shape = self._first_shape(files, log)
        return {"files": files, "shape": shape}

    def use_survey(self, survey: dict[str, Any]) -> None:
        """Set the files and the shape that rank 0 found."""
        self.files = [SourceFile(*file) for file in survey["files"]]
        self.shape = tuple(survey["shape"])
        self._expected = ExpectedShape(self.shape, self.files[0].path)
        self._keys = DocumentKeys(self.fractions, self.seed)

    def source(self) -> dict[str, Any]:
        """Return the entry of the index that describes the source and the options."""
        options = {"array": self.array.name, "layout": self.array.layout}
        return {
            "name": ", ".join(path.resolve().name for path in self.inputs),
            "kind": "images",
            "shape": self.shape,
            **fingerprint(self.files),
            "split": self.fractions or "folders",
            "seed": self.seed,
        } | {key: value for key, value in options.items() if value}

    def tasks(self) -> list[ReadTask]:
        """Return all tasks; only .npy files can be split."""
        return make_tasks(self.files, lambda file: is_npy(file.path))

    def documents(
        self, segment: Segment, scratch: Path, advance: Advance, log: SkipLog = STOP
    ) -> Iterator[KeyedBatch]:
        """Yield (keys, batch) of the images of a segment."""
        file = self.files[segment.file]
        for positions, batch in group_documents(self._images(file, segment, advance, log)):
            yield self._keys(file, positions, batch), batch

    def _images(
        self, file: SourceFile, segment: Segment, advance: Advance, log: SkipLog
    ) -> Iterator[tuple[int, bytes]]:
        """Yield (position, sub-pixels) of the images of a segment."""
        path = Path(file.path)
        if path.suffix.lower() in PICTURES:
            try:
                picture = _picture(path, self._expected)
            except DataError as error:
                log.skip(path, "image", None, error)
                return
            if picture.turned:
                log.remarks[TURNED] += 1
            yield 0, picture.content
            return
        span = (segment.begin, segment.end)
        for position, content, shape in read_array(path, self.array, *span, advance):
            self._expected.check(path, shape)
            yield position, content

    def _first_shape(
        self, files: list[SourceFile], log: SkipLog
    ) -> tuple[list[SourceFile], ImageShape]:
        """Return the files from the first that can be read on, and its shape."""
        for number, file in enumerate(files):
            path = Path(file.path)
            is_picture = path.suffix.lower() in PICTURES
            try:
                shape = _picture(path).shape if is_picture else array_shape(path, self.array)
            except DataError as error:
                log.skip(path, "image" if is_picture else "file", None, error)
            else:
                return files[number:], shape
        raise DataError(f"--input {self.inputs[0]}: contains no image that can be read")

    def _count_others(self) -> Counter[str]:
        """Count the files of the input folders that are no images, by suffix."""
        others: Counter[str] = Counter()
        for folder in self.inputs:
            for root, _, names in os.walk(folder):
                for name in names:
                    suffix = Path(name).suffix.lower()
                    relative = Path(root, name).relative_to(folder).as_posix()
                    if suffix not in PICTURES + ARRAYS and not matches_any(relative, self.exclude):
                        others[suffix or "without a suffix"] += 1
        return others

    def _describe_others(self) -> str:
        return f" (there are {_list_counts(self.others)})" if self.others else ""

    def remarks(self) -> Iterator[str]:
        """Yield what was read and what was not, for the user."""
        yield f"  files: {_list_counts(Counter(Path(f.path).suffix.lower() for f in self.files))}"
        if self.others:
            yield f"  left out, as they are no images: {_list_counts(self.others)}"
        yield from (line for line in self.left_out.lines() if BY_PATTERN not in line)


def _list_counts(suffixes: Counter[str]) -> str:
    """Return `12 .png, 6 .webp`."""
    return ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(suffixes.items()))


def _any_case(suffix: str) -> str:
    """Return a pattern for names with a suffix in upper, lower or mixed case."""
    return "*" + "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in suffix)


_IMAGE_PATTERNS = tuple(_any_case(suffix) for suffix in PICTURES + ARRAYS)


def _picture(path: Path, expected: ExpectedShape | None = None) -> Picture:
    try:
        return read_picture(path, expected)
    except DataError as error:
        raise DataError(f"{error}, or leave it out with --exclude") from None
