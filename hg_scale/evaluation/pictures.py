"""Images from files, and many images as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hg_scale.data.preparation.images import ARRAYS, PICTURES, read_array, read_picture
from hg_scale.errors import UserError

ImageArray = NDArray[np.uint8]  # (height, width, channels)

GAP = 2  # pixels between images
LEAST = 64  # pixels of the longer side of an image on the page; smaller ones are enlarged


def read_images(paths: Sequence[Path], shape: tuple[int, int, int], most: int) -> list[ImageArray]:
    """The images of files as prepare_images.py takes them: .png, .jpg, .npy, .npz.

    Raises UserError where a file cannot be read, an image has another shape, or there are more
    than `most`.
    """
    images: list[ImageArray] = []
    for path in paths:
        if path.suffix.lower() in PICTURES:
            found = iter([read_picture(path)])
        elif path.suffix.lower() in ARRAYS:
            size = path.stat().st_size if path.is_file() else 0
            found = (entry[1:] for entry in read_array(path, None, 0, size, lambda _: None))
        else:
            raise UserError(f"{path}: not an image; expected .png, .jpg, .npy or .npz")
        for pixels, its in found:
            if its != shape:
                raise UserError(
                    f"{path}: has shape {its}, the model draws {shape} (height, width, channels); "
                    "scale it first"
                )
            if len(images) == most:
                raise UserError(
                    f"{path}: with it there are more than {most} images; give a file of those that "
                    "are meant"
                )
            images.append(np.frombuffer(pixels, np.uint8).reshape(shape))
    return images


def write_grid(path: Path, rows: Sequence[Sequence[ImageArray]]) -> None:
    """Rows of images of one shape as a PNG file. Raises UserError where it cannot be written."""
    try:
        path.write_bytes(grid_png(rows))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def grid_png(rows: Sequence[Sequence[ImageArray]]) -> bytes:
    """Rows of images of one shape as a PNG; small images are enlarged by a whole number."""
    from PIL import Image as Pillow

    height, width, channels = rows[0][0].shape
    scale = max(1, LEAST // max(height, width))
    step = height * scale + GAP, width * scale + GAP
    columns = max(len(row) for row in rows)
    page = np.full((len(rows) * step[0] + GAP, columns * step[1] + GAP, channels), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            large = image.repeat(scale, 0).repeat(scale, 1)
            top, left = GAP + i * step[0], GAP + j * step[1]
            page[top : top + large.shape[0], left : left + large.shape[1]] = large
    picture = Pillow.fromarray(page[:, :, 0] if channels == 1 else page)
    file = BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()
