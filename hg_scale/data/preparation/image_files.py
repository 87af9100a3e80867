"""Decode picture files (PNG, JPEG, WebP, ...) into rows of 8-bit gray or RGB, or refuse them.

Nothing is converted with loss: what is not gray or RGB of 8 bits, is transparent, or has several
frames is refused by name. Orientations of EXIF are applied, so that an image is what viewers show.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hg_scale.data.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

ImageShape = tuple[int, int, int]  # height, width, channels

PICTURES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".avif",
)  # fmt: skip
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # of the contents

_BITS_PER_SAMPLE, _ORIENTATION = 258, 274  # tags of TIFF and EXIF
_AVIF_HEADER = 1 << 16  # bytes that contain the description of the image
_EXACT = {"1": "L", "P": "RGB"}  # modes that become gray or RGB without loss


class ExpectedShape(NamedTuple):
    """The shape that images need, and the file that has it."""

    shape: ImageShape
    of: str

    def check(self, path: Path, shape: ImageShape) -> None:
        """Raise DataError where an image has another shape."""
        if shape != self.shape:
            found, needed = describe_shape(shape), describe_shape(self.shape)
            raise DataError(
                f"{path}: {found}, but {self.of} has {needed}; all images "
                "need the same size: prepare them separately"
            )


class Picture(NamedTuple):
    """A decoded picture; `turned`: an orientation of EXIF was applied."""

    content: bytes  # of the sub-pixels, row by row
    shape: ImageShape
    turned: bool


def read_picture(path: Path, expected: ExpectedShape | None = None) -> Picture:
    """Return the sub-pixels of a picture file.

    Raises DataError where it cannot be read, is not 8-bit gray or RGB, is transparent, has several
    frames, or has not the `expected` shape (which is found out before the pixels are decoded).
    """
    from PIL import ImageOps

    with _open(path) as image:
        _refuse_unsupported(path, image)
        orientation = image.getexif().get(_ORIENTATION, 1)
        if expected is not None:
            expected.check(path, _shape_of(image, orientation))
        upright: Image.Image = ImageOps.exif_transpose(image)
        if upright.mode in _EXACT:
            upright = upright.convert(_EXACT[upright.mode])
        if upright.mode not in ("L", "RGB"):  # only decoding shows it
            raise _refusal(path, upright.mode)
        width, height = upright.size
        shape = (height, width, 1 if upright.mode == "L" else 3)
        return Picture(upright.tobytes(), shape, orientation in range(2, 9))


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open an image. What any decoder raises, also later, becomes a DataError."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                yield image
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        raise DataError(
            f"{path}: cannot be read as an image (its contents are of no supported format, or "
            "corrupt); download it again"
        ) from None
    except Exception as error:  # decoders raise nearly everything
        raise DataError(
            f"{path}: cannot be read as an image ({error_reason(error)}); download it again"
        ) from None


def error_reason(error: Exception) -> str:
    """Return what an error of a decoder says, as one line."""
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def describe_shape(shape: ImageShape) -> str:
    """Return `6 x 5 pixels of 3 channels`."""
    height, width, channels = shape
    return f"{height} x {width} pixels of {channels} channel{'s' * (channels > 1)}"


def _shape_of(image: Image.Image, orientation: int) -> ImageShape:
    """Return the shape of an image that is not decoded yet."""
    width, height = image.size  # of TIFF already turned
    if orientation in range(5, 9) and image.format != "TIFF":
        width, height = height, width
    return height, width, 1 if image.mode in ("1", "L") else 3


def _refuse_unsupported(path: Path, image: Any) -> None:
    """Raise DataError where an image cannot become one 8-bit gray or RGB image without loss."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 or _another_follows(path, image):
        count = f"{frames} frames or pages" if frames > 1 else "several images"
        raise DataError(f"{path}: has {count}, expected one; save each as a file of its own")
    fourth = image.format == "BMP" and "BGRX" in image.tile[0].args  # pillow drops it
    if image.has_transparency_data or image.mode in ("RGBa", "La") or fourth:
        raise DataError(
            f"{path}: is {image.mode} with transparency, which gray and RGB cannot represent; put "
            "it on a background"
        )
    if (bits := _bits_per_channel(path, image)) > 8:
        raise _refusal(path, f"{bits} bits per channel")
    if image.mode not in ("L", "RGB", *_EXACT):
        raise _refusal(path, image.mode)


def _refusal(path: Path, mode: str) -> DataError:
    return DataError(
        f"{path}: is {mode}, which cannot become 8-bit gray or RGB without loss; convert it"
    )


def _bits_per_channel(path: Path, image: Any) -> int:
    """Return the bits per channel in the file; pillow silently reduces them to 8."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    if image.format == "PPM":
        arguments = image.tile[0].args  # (mode, largest value) where values are scaled
        largest = arguments[1] if isinstance(arguments, tuple) and len(arguments) == 2 else 0
        return 16 if largest > 255 else 8
    with path.open("rb") as file:
        head = file.read(_AVIF_HEADER if image.format == "AVIF" else 32)
    if image.format == "PNG":
        return head[24]
    if image.format == "AVIF":
        properties = head.partition(b"av1C")[2]  # its third byte has a bit for more than 8
        return 10 if properties[2:3] and properties[2] & 0x40 else 8
    return 8


def _another_follows(path: Path, image: Any) -> bool:
    """Whether a binary PPM file has a second image, as `cat` makes them; pillow does not look."""
    if image.format != "PPM":
        return False
    with path.open("rb") as file:
        if file.read(2) not in (b"P4", b"P5", b"P6"):
            return False
        width, height = image.size
        arguments = image.tile[0].args
        wide = (
            2 if isinstance(arguments, tuple) and len(arguments) == 2 and arguments[1] > 255 else 1
        )
        row = -(-width // 8) if image.mode == "1" else width * len(image.getbands()) * wide
        file.seek(image.tile[0].offset + row * height)
        return file.read(16).lstrip()[:1] == b"P"
