"""An image corpus: PNG, JPEG and NumPy files, read as sequences of sub-pixels.

An image is a document of H x W x C bytes in row-major order: the channels of a pixel are adjacent
(red, green, blue; or one for gray). Images are never resized, cropped or converted with loss.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.batches import group_documents
from hg_scale.data.preparation.corpus import (
    DocumentKeys,
    KeyedBatch,
    ReadTask,
    Segment,
    SourceFile,
    fingerprint,
    list_files,
    make_tasks,
    refuse_empty,
)
from hg_scale.data.preparation.sources import Advance
from hg_scale.data.tokenizer import ByteTokenizer

PICTURES = (".png", ".jpg", ".jpeg")
ARRAYS = (".npy", ".npz")
_KNOWN = tuple(f"*{end}" for name in PICTURES + ARRAYS for end in (name, name.upper()))

ImageShape = tuple[int, int, int]  # height, width, channels


@dataclass
class ImageCorpus:
    """Images of equal size, shuffled; split by their content, or by their folder."""

    inputs: tuple[Path, ...]
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    fractions: tuple[float, ...] | None = (0.9, 0.05, 0.05)  # None: by folder
    seed: int = 0
    array: str | None = None  # name of the images in .npz files with several arrays

    tokenizer: ByteTokenizer = field(default_factory=lambda: ByteTokenizer(documents=False))
    files: list[SourceFile] = field(default_factory=list, init=False)
    shape: ImageShape = field(default=(0, 0, 0), init=False)

    @property
    def document_tokens(self) -> int:
        """Sub-pixels per image."""
        return math.prod(self.shape)

    def survey(self) -> dict[str, Any]:
        """Return the files, and the shape of the first image, which all images must have."""
        include = _KNOWN if self.include == ("*",) else self.include
        files = list_files(self.inputs, include, self.exclude)
        for file in files:
            if Path(file.path).suffix.lower() not in PICTURES + ARRAYS:
                raise DataError(
                    f"{file.path}: not an image; expected .png, .jpg, .npy or .npz: leave it out "
                    "with --exclude"
                )
        refuse_empty(files)
        return {"files": files, "shape": self._first_shape(Path(files[0].path))}

    def use_survey(self, survey: dict[str, Any]) -> None:
        """Set the files and the shape that rank 0 found."""
        self.files = [SourceFile(*file) for file in survey["files"]]
        self.shape = tuple(survey["shape"])
        self._keys = DocumentKeys(self.fractions, self.seed)

    def source(self) -> dict[str, Any]:
        """Return the entry of the index that describes the source and the options."""
        return {
            "name": ", ".join(path.resolve().name for path in self.inputs),
            "kind": "images",
            "shape": self.shape,
            **fingerprint(self.files),
            "split": self.fractions or "folders",
            "seed": self.seed,
        } | ({"array": self.array} if self.array else {})

    def tasks(self) -> list[ReadTask]:
        """Return all tasks; only .npy files can be split."""
        return make_tasks(self.files, lambda file: Path(file.path).suffix == ".npy")

    def documents(self, segment: Segment, scratch: Path, advance: Advance) -> Iterator[KeyedBatch]:
        """Yield (keys, batch) of the images of a segment."""
        file = self.files[segment.file]
        for positions, batch in group_documents(self._images(file, segment, advance)):
            yield self._keys(file, positions, batch), batch

    def _images(
        self, file: SourceFile, segment: Segment, advance: Advance
    ) -> Iterator[tuple[int, bytes]]:
        """Yield (position, sub-pixels) of the images of a segment."""
        path = Path(file.path)
        if path.suffix.lower() in PICTURES:
            images = iter([(0, *_picture(path))])
        else:
            images = read_array(path, self.array, segment.begin, segment.end, advance)
        for position, content, shape in images:
            if shape != self.shape:
                raise DataError(
                    f"{path}: {_describe(shape)}, but {self.files[0].path} has "
                    f"{_describe(self.shape)}; all images need the same size: prepare them "
                    "separately, or leave it out with --exclude"
                )
            yield position, content

    def _first_shape(self, path: Path) -> ImageShape:
        if path.suffix.lower() in PICTURES:
            return _picture(path)[1]
        with _open_array(path, self.array) as (_, shape):
            return _image_shape(shape)


def _picture(path: Path) -> tuple[bytes, ImageShape]:
    try:
        return read_picture(path)
    except DataError as error:
        raise DataError(f"{error}, or leave it out with --exclude") from None


def read_picture(path: Path) -> tuple[bytes, ImageShape]:
    """Return the sub-pixels of a PNG or JPEG file, and its shape.

    Raises DataError where it cannot be read, or not converted to 8-bit gray or RGB without loss.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            image: Image.Image = opened
            mode = image.mode
            if opened.format == "PNG" and _png_depth(path) > 8:
                mode = "16 bits per channel"
            elif mode == "1":
                image, mode = image.convert("L"), "L"
            elif mode == "P" and "transparency" not in image.info:
                image, mode = image.convert("RGB"), "RGB"
            if mode not in ("L", "RGB"):
                raise DataError(
                    f"{path}: is {mode}, which cannot become 8-bit gray or RGB without loss; "
                    "convert it"
                )
            width, height = image.size
            return image.tobytes(), (height, width, 1 if mode == "L" else 3)
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = f"{path}: cannot be read as an image ({reason}); download it again"
        raise DataError(message) from None


def _png_depth(path: Path) -> int:
    """Return the bits per channel; pillow silently reduces them to 8."""
    with path.open("rb") as file:
        return file.read(25)[24]


def read_array(
    path: Path, name: str | None, begin: int, end: int, advance: Advance
) -> Iterator[tuple[int, bytes, ImageShape]]:
    """Yield (number, sub-pixels, shape) of the images whose first byte is in [begin, end).

    A .npz file is read from start to end. Raises DataError where the array cannot be read.
    """
    with _open_array(path, name) as (file, full):
        shape = _image_shape(full)
        size, count = math.prod(shape), full[0]
        first, last = 0, count
        if path.suffix == ".npy":
            start = file.tell()
            first = max(0, -(-(begin - start) // size))
            last = min(count, max(0, -(-(end - start) // size)))
            file.seek(start + first * size)
        for number in range(first, last):
            content = file.read(size)
            if len(content) < size:
                raise DataError(f"{path}: ends at image {number} of {count}; download it again")
            advance(size)
            yield number, content, shape


@contextmanager
def _open_array(path: Path, name: str | None) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """Open an array of images at its first byte. Yields the file and the array's shape."""
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                yield file, _check_header(path, *_header(file))
            return
        with zipfile.ZipFile(path) as archive:
            names = [entry.removesuffix(".npy") for entry in archive.namelist()]
            chosen = name if name in names else None
            if name is None:
                images = []
                for entry in names:
                    with archive.open(f"{entry}.npy") as file:
                        shape, _, dtype = _header(file)
                        if dtype == np.uint8 and len(shape) in (3, 4):
                            images.append(entry)
                chosen = images[0] if len(images) == 1 else None
            if chosen is None:
                raise DataError(
                    f"{path}: holds {', '.join(names) or 'nothing'}; expected one array of images, "
                    "uint8 (N, H, W, 3) or (N, H, W), or its name in prepare_images.py --array"
                )
            with archive.open(f"{chosen}.npy") as file:
                yield file, _check_header(path, *_header(file))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        message = f"{path}: cannot be read as an array ({reason}); download it again"
        raise DataError(message) from None


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return (shape, whether it is in Fortran order, dtype) of the .npy file."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _check_header(
    path: Path, shape: tuple[int, ...], fortran_order: bool, dtype: np.dtype[Any]
) -> tuple[int, ...]:
    fits = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
    if dtype != np.uint8 or fortran_order or not fits or 0 in shape:
        raise DataError(
            f"{path}: holds {dtype} {shape}{' in Fortran order' if fortran_order else ''}; expected"
            " uint8 (N, H, W, 3) or (N, H, W): reshape it and save it again"
        )
    return shape


def _image_shape(shape: tuple[int, ...]) -> ImageShape:
    return shape[1], shape[2], shape[3] if len(shape) == 4 else 1


def _describe(shape: ImageShape) -> str:
    height, width, channels = shape
    return f"{height} x {width} pixels of {channels} channel{'s' * (channels > 1)}"
