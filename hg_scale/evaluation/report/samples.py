"""Samples of a run: generated text or images."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass

import numpy as np

from hg_scale.data.inspection import printable
from hg_scale.errors import UserError
from hg_scale.evaluation.generation import (
    TEMPERATURE,
    GenerationConfig,
    generate_images,
    generate_sample,
)
from hg_scale.evaluation.loaded_model import LoadedModel, load
from hg_scale.evaluation.pictures import grid_png
from hg_scale.evaluation.report.run_folder import RunFolder
from hg_scale.model.sampling import Sampling

MAX_SUB_PIXELS = 8192  # per sample of several images


@dataclass(frozen=True)
class Sample:
    """Text or a PNG (base64) from the newest checkpoint; `how` says how, or why there is none."""

    text: str
    how: str
    png: str = ""


def generate_run_sample(run: RunFolder, tokens: int, seed: int) -> Sample:
    """Generate `tokens` tokens without a prompt, or a few images."""
    if not any(checkpoint.problem is None for checkpoint in run.checkpoints):
        return Sample("", "no sample: the run has no complete checkpoint")
    try:
        loaded = load(run.path)
        if loaded.image_shape is not None:
            return _sample_images(loaded, seed)
        text = generate_sample(loaded, tokens, seed)
    except UserError as error:
        return Sample("", f"no sample: {'; '.join(str(error).splitlines())}")
    return Sample(
        printable(text.replace("\r\n", "\n")),
        f"{tokens} tokens without a prompt, temperature {TEMPERATURE}, seed {seed}",
    )


def _sample_images(loaded: LoadedModel, seed: int) -> Sample:
    size = loaded.index.document_tokens if loaded.index else None
    assert size
    count = max(1, min(8, MAX_SUB_PIXELS // size))
    prefixes = [np.empty(0, np.uint8)] * count
    steps = generate_images(loaded, prefixes, GenerationConfig(Sampling(1.0), size, seed))
    images = [image for _, image in steps if image is not None]
    png = b64encode(grid_png([images])).decode()
    return Sample("", f"{count} images, temperature 1, seed {seed}", png)
