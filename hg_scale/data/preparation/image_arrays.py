"""Read images from NumPy files: stacks of them or single ones, by a stated or an evident layout.

A layout names the axes: N images, H rows, W columns, C channels. Without one, the shape decides:

    (N, H, W, C) with 1 or 3 channels      NHWC
    (H, W, C) with 1 or 3 channels         HWC, a single image; a gray stack is never that narrow
    (N, H, W)                              NHW
    (3, H, W), (N, 3, H, W), (H, W), ...   refused, as it may be either: the caller states a layout
"""

from __future__ import annotations

import math
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.image_files import ImageShape, error_reason
from hg_scale.data.preparation.sources import Advance

ARRAYS = (".npy", ".npz")
LAYOUTS = ("NHWC", "NHW", "NCHW", "HWC", "HW", "CHW")

_MAX_IMAGE_BYTES = 1 << 28  # about the pixels that pillow accepts
_CHANNELS, _WITH_ALPHA = (1, 3), (1, 3, 4)


@dataclass(frozen=True)
class ArrayOptions:
    """Which array of a .npz file, and the meaning of its axes; None: found out.

    Where the shape of the images is known, the layout that gives it is preferred.
    """

    name: str | None = None
    layout: str | None = None
    image: ImageShape | None = None


@dataclass(frozen=True)
class ArrayImages:
    """The images in an array: how many, their stored shape and their shape."""

    layout: str  # one of LAYOUTS
    count: int
    shape: ImageShape

    @property
    def size(self) -> int:
        """Bytes of an image."""
        return math.prod(self.shape)

    def pixels(self, content: bytes) -> bytes:
        """Return a stored image row by row, with the channels of a pixel adjacent."""
        if "CH" not in self.layout:
            return content
        height, width, channels = self.shape
        planes = np.frombuffer(content, np.uint8).reshape(channels, height, width)
        return planes.transpose(1, 2, 0).tobytes()


def array_shape(path: Path, options: ArrayOptions) -> ImageShape:
    """Return the shape of the images in an array. Raises DataError as `read_array`."""
    with _open_array(path, options) as (_, images):
        return images.shape


def read_array(
    path: Path, options: ArrayOptions, begin: int, end: int, advance: Advance
) -> Iterator[tuple[int, bytes, ImageShape]]:
    """Yield (number, sub-pixels, shape) of the images whose first byte is in [begin, end).

    A .npz file is read from start to end. Raises DataError where the array cannot be read or is
    not of images.
    """
    with _open_array(path, options) as (file, images):
        size, first, last = images.size, 0, images.count
        if is_npy(path):
            start = file.tell()
            first = max(0, -(-(begin - start) // size))
            last = min(images.count, max(0, -(-(end - start) // size)))
            file.seek(start + first * size)
        for number in range(first, last):
            content = file.read(size)
            if len(content) < size:
                raise _too_short(path, number, images.count)
            advance(size)
            yield number, images.pixels(content), images.shape


def is_npy(path: Path | str) -> bool:
    """Whether a file is a .npy file, by its name; parts of it can then be read."""
    return Path(path).suffix.lower() == ".npy"


@contextmanager
def _open_array(path: Path, options: ArrayOptions) -> Iterator[tuple[IO[bytes], ArrayImages]]:
    """Open an array of images at its first byte. What any decoder raises becomes a DataError."""
    try:
        if is_npy(path):
            with path.open("rb") as file:
                images = _images_in(path, _read_header(file), options)
                stored = os.fstat(file.fileno()).st_size - file.tell()
                _check_size(path, stored, images)
                yield file, images
            return
        with zipfile.ZipFile(path) as archive:
            entry = f"{_choose(path, archive, options)}.npy"
            with archive.open(entry) as file:
                images = _images_in(path, _read_header(file), options)
                _check_size(path, archive.getinfo(entry).file_size - file.tell(), images)
                yield file, images
    except DataError:
        raise
    except Exception as error:  # parsers of headers raise nearly everything
        raise DataError(
            f"{path}: cannot be read as an array ({error_reason(error)}); download it again"
        ) from None


def _check_size(path: Path, stored: int, images: ArrayImages) -> None:
    if stored < images.count * images.size:
        raise _too_short(path, max(0, stored) // images.size, images.count)
    if stored > images.count * images.size:
        raise DataError(
            f"{path}: has {stored - images.count * images.size} bytes after its array, perhaps "
            "another one; save each array as a file of its own"
        )


def _too_short(path: Path, number: int, count: int) -> DataError:
    return DataError(f"{path}: ends at image {number} of {count}; download it again")


def _choose(path: Path, archive: zipfile.ZipFile, options: ArrayOptions) -> str:
    """Return the name of the array in a .npz file that is named, or the only one of images."""
    names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    chosen = [options.name] if options.name in names else []
    if options.name is None:
        for name in names:
            with archive.open(f"{name}.npy") as file:
                shape, _, dtype = _read_header(file)
                if dtype == np.uint8 and len(shape) in (3, 4):
                    chosen.append(name)
    if len(chosen) != 1 or chosen[0] is None:
        raise DataError(
            f"{path}: holds {', '.join(names) or 'nothing'}; expected one array of images, "
            "uint8 (N, H, W, 3) or (N, H, W), or its name in prepare_images.py --array"
        )
    return chosen[0]


_Header = tuple[tuple[int, ...], bool, np.dtype[Any]]


def _read_header(file: IO[bytes]) -> _Header:
    """Return (shape, whether it is in Fortran order, dtype). Nothing is unpickled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the parser, about odd headers
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(file)
        return np.lib.format.read_array_header_2_0(file)


def _images_in(path: Path, header: _Header, options: ArrayOptions) -> ArrayImages:
    """Return the images of an array. Raises DataError where it is not of images, or ambiguous."""
    shape, fortran_order, dtype = header
    held = f"{dtype} {shape}{' in Fortran order' if fortran_order else ''}"
    expected = f"{path}: holds {held}; expected uint8 (N, H, W, 3), (N, H, W) or (H, W, 3)"
    if dtype != np.uint8 or (fortran_order and len(shape) > 1) or min(shape, default=0) < 1:
        raise DataError(f"{expected}: convert it and save it again")
    layout = options.layout or _layout_giving(options.image, shape) or _evident_layout(shape)
    if layout is None:
        fitting = [name for name in LAYOUTS if _fits(name, shape)]
        if not fitting:
            raise DataError(f"{expected}: reshape it and save it again")
        raise DataError(
            f"{expected}: the axes of {shape} can be read in several ways; state them with "
            f"--array-layout, one of {', '.join(fitting)}"
        )
    if len(layout) != len(shape):
        raise DataError(
            f"{path}: holds {held}, which is not {layout} (--array-layout); prepare arrays of "
            "another layout separately, or leave it out with --exclude"
        )
    images = _arrange(layout, shape)
    if images.shape[2] == 4:
        raise DataError(
            f"{path}: holds {held}, as {layout} with 4 channels, RGB with transparency or CMYK; "
            "convert it to RGB, or state another --array-layout"
        )
    if images.shape[2] not in _CHANNELS:
        raise DataError(f"{expected}; as {layout} it has {images.shape[2]} channels: convert it")
    if images.size > _MAX_IMAGE_BYTES:
        raise DataError(f"{path}: holds {held}, images of more than {_MAX_IMAGE_BYTES} bytes")
    return images


def _arrange(layout: str, shape: tuple[int, ...]) -> ArrayImages:
    axes = dict(zip(layout, shape, strict=True))
    return ArrayImages(layout, axes.get("N", 1), (axes["H"], axes["W"], axes.get("C", 1)))


def _layout_giving(image: ImageShape | None, shape: tuple[int, ...]) -> str | None:
    """Return the only layout in which an array of `shape` holds images of shape `image`."""
    fitting = [name for name in LAYOUTS if _fits(name, shape)]
    giving = [name for name in fitting if _arrange(name, shape).shape == image]
    return giving[0] if len(giving) == 1 else None


def _evident_layout(shape: tuple[int, ...]) -> str | None:
    """Return the layout that a shape has beyond doubt, or None; see the top of this file."""
    if len(shape) == 4:
        return "NHWC" if shape[3] in _WITH_ALPHA else None
    if len(shape) == 3:
        if shape[2] in _WITH_ALPHA:
            return None if shape[0] in _WITH_ALPHA else "HWC"
        return None if shape[0] in (3, 4) else "NHW"  # (1, H, W) is the same image as CHW
    return None


def _fits(layout: str, shape: tuple[int, ...]) -> bool:
    if len(layout) != len(shape):
        return False
    return "C" not in layout or shape[layout.index("C")] in _CHANNELS
