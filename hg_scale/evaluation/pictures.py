"""Images read from files, and grids of images written as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np

from hg_scale.data.preparation.image_arrays import ARRAYS, ArrayOptions, read_array
from hg_scale.data.preparation.image_files import PICTURES, read_picture
from hg_scale.errors import UserError
from hg_scale.evaluation.generation import ImageArray

GAP = 2  # pixels between images
MIN_SIDE = 64  # pixels of the longer side of an image in a grid; smaller images are enlarged


def read_images(paths: Sequence[Path], shape: tuple[int, int, int], limit: int) -> list[ImageArray]:
    """Read the images of picture files and .npy and .npz arrays, as prepare_images.py does.

    Raises UserError where a file cannot be read, an image has another shape, or there are more
    than `limit` images.
    """
    images: list[ImageArray] = []
    for path in paths:
        if path.suffix.lower() in PICTURES:
            entries = iter([read_picture(path)[:2]])
        elif path.suffix.lower() in ARRAYS:
            size = path.stat().st_size if path.is_file() else 0
            arrays = read_array(path, ArrayOptions(image=shape), 0, size, lambda _: None)
            entries = (entry[1:] for entry in arrays)
        else:
            raise UserError(f"{path}: not an image; expected {', '.join(PICTURES + ARRAYS)}")
        for pixels, image_shape in entries:
            if image_shape != shape:
                raise UserError(
                    f"{path}: has shape {image_shape}, the model generates {shape} (height, width, "
                    "channels); resize it first"
                )
            if len(images) == limit:
                raise UserError(
                    f"{path}: makes more than {limit} images; give a file with fewer of them"
                )
            images.append(np.frombuffer(pixels, np.uint8).reshape(shape))
    return images


def write_grid(path: Path, rows: Sequence[Sequence[ImageArray]]) -> None:
    """Write rows of images of one shape as a PNG file. Raises UserError where that fails."""
    try:
        path.write_bytes(grid_png(rows))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


def grid_png(rows: Sequence[Sequence[ImageArray]]) -> bytes:
    """Encode rows of images of one shape as a PNG; small images are enlarged by an integer."""
    from PIL import Image as Pillow

    height, width, channels = rows[0][0].shape
    zoom = max(1, MIN_SIDE // max(height, width))
    step = height * zoom + GAP, width * zoom + GAP
    columns = max(len(row) for row in rows)
    page = np.full((len(rows) * step[0] + GAP, columns * step[1] + GAP, channels), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            enlarged = image.repeat(zoom, 0).repeat(zoom, 1)
            top, left = GAP + i * step[0], GAP + j * step[1]
            page[top : top + enlarged.shape[0], left : left + enlarged.shape[1]] = enlarged
    picture = Pillow.fromarray(page[:, :, 0] if channels == 1 else page)
    file = BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()
