"""What a run writes, or draws."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass

import numpy as np

from hg_scale.data.inspection import printable
from hg_scale.errors import UserError
from hg_scale.evaluation.generation import TEMPERATURE, GenerationConfig, draw_images, write_sample
from hg_scale.evaluation.loaded_model import LoadedModel, load
from hg_scale.evaluation.pictures import grid_png
from hg_scale.evaluation.report.run_folder import RunFolder
from hg_scale.model.sampling import Sampling

SUB_PIXELS = 8192  # that a sample of images takes at most, but for one image


@dataclass(frozen=True)
class Sample:
    """Text of the newest checkpoint, or a PNG (base64), or why there is neither."""

    text: str
    how: str
    png: str = ""


def sample_of(run: RunFolder, tokens: int, seed: int) -> Sample:
    """`tokens` tokens from the beginning of a document, or a few images."""
    if not any(checkpoint.fault is None for checkpoint in run.checkpoints):
        return Sample("", "no sample: the run has no whole checkpoint")
    try:
        trained = load(run.path)
        if trained.images is not None:
            return _images(trained, seed)
        text = write_sample(trained, tokens, seed)
    except UserError as error:
        return Sample("", f"no sample: {'; '.join(str(error).splitlines())}")
    return Sample(
        printable(text.replace("\r\n", "\n")),
        f"{tokens} tokens from an empty beginning, temperature {TEMPERATURE}, seed {seed}",
    )


def _images(trained: LoadedModel, seed: int) -> Sample:
    size = trained.index.document_tokens if trained.index else None
    assert size
    count = max(1, min(8, SUB_PIXELS // size))
    nothing = [np.empty(0, np.uint8)] * count
    drawn = draw_images(trained, nothing, GenerationConfig(Sampling(1.0), size, seed))
    images = [image for _, image in drawn if image is not None]
    png = b64encode(grid_png([images])).decode()
    return Sample("", f"{count} images, temperature 1, seed {seed}", png)
