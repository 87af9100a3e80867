"""Generation with a trained model: text, streamed in chunks, and images."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hg_scale.data.tokenizer import Tokenizer
from hg_scale.errors import UserError
from hg_scale.model.decoding import generate
from hg_scale.model.sampling import Sampling

if TYPE_CHECKING:
    from hg_scale.evaluation.loaded_model import LoadedModel

TEMPERATURE = 0.8  # default, and that of samples in summaries and reports
GRAY = 128  # value of masked pixels

ImageArray = NDArray[np.uint8]  # (height, width, channels)


@dataclass(frozen=True)
class GenerationConfig:
    """How to generate: up to `tokens` tokens per text, `batch` texts at a time.

    `context`: tokens that the model attends to; None: its training sequence length.
    """

    sampling: Sampling
    tokens: int
    seed: int = 1
    batch: int = 8
    context: int | None = None


class TextChunk(NamedTuple):
    """Zero or more characters of the text number `row`; `last` marks the end of that text."""

    row: int
    text: str
    last: bool = False


class Detokenizer:
    """Incremental decoder from tokens to complete characters; partial UTF-8 is buffered."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """Return the characters that `token` completes; invalid UTF-8 becomes U+FFFD."""
        return self._utf8.decode(self._tokenizer.decode(np.array([token])))

    def finish(self) -> str:
        """Return U+FFFD where the text ends inside a character, else an empty string."""
        return self._utf8.decode(b"", final=True)


def generate_texts(
    loaded: LoadedModel, prompts: Sequence[bytes], config: GenerationConfig
) -> Iterator[TextChunk]:
    """Yield the continuation of each prompt as it is generated, the texts of a batch interleaved.

    A text ends at the end of its document (the token is not part of it) or after `config.tokens`.
    Where the data has documents, a prompt starts a new one. Raises UserError for image models.
    """
    if loaded.image_shape is not None:
        raise UserError(
            f"{loaded.data_source}: contains images, so no text can be generated; generate images "
            "with `hg-scale generate`"
        )
    tokenizer = loaded.tokenizer
    start = tokenizer.eod or 0
    ids = [[start, *tokenizer.encode(prompt).tolist()] for prompt in prompts]
    return generate_from_ids(loaded, ids, config)


def generate_from_ids(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig
) -> Iterator[TextChunk]:
    """Like `generate_texts`, from token ids (at least one per prompt), used as they are."""
    tokenizer = loaded.tokenizer
    for first in range(0, len(prompts), config.batch):
        ids = [list(prompt) for prompt in prompts[first : first + config.batch]]
        detokenizers = [Detokenizer(tokenizer) for _ in ids]
        remaining = [config.tokens] * len(ids)
        for row, token in generate(
            loaded.model, ids, config.tokens, config.sampling, seed=config.seed,
            stop=tokenizer.eod, context=config.context, first_row=first,
            vocab_size=tokenizer.vocab_size,
        ):  # fmt: skip
            remaining[row] -= 1
            last = token == tokenizer.eod or not remaining[row]
            text = "" if token == tokenizer.eod else detokenizers[row].add(token)
            tail = detokenizers[row].finish() if last else ""
            yield TextChunk(first + row, text + tail, last)


def generate_sample(loaded: LoadedModel, tokens: int, seed: int) -> str:
    """Return one text without a prompt, at the default temperature."""
    config = GenerationConfig(Sampling(TEMPERATURE), tokens, seed)
    return "".join(chunk.text for chunk in generate_texts(loaded, [b""], config))


def in_prompt_order(chunks: Iterable[TextChunk]) -> Iterator[TextChunk]:
    """Yield the chunks text by text, buffering those of later texts.

    The first unfinished text is passed on as it arrives.
    """
    current, buffered = 0, dict[int, list[TextChunk]]()
    for chunk in chunks:
        buffered.setdefault(chunk.row, []).append(chunk)
        while current in buffered:
            ready = buffered.pop(current)
            yield from ready
            if not ready[-1].last:
                break
            current += 1


def generate_images(
    loaded: LoadedModel, prefixes: Sequence[NDArray[np.uint8]], config: GenerationConfig
) -> Iterator[tuple[int, ImageArray | None]]:
    """Complete images from their first sub-pixels, one array (n,) per image, n the same for all.

    Yields (row, None) for every sub-pixel generated and (row, image) for the last of an image.
    Raises UserError for text models.
    """
    shape = loaded.image_shape
    if shape is None:
        raise UserError(f"{loaded.data_source}: contains text, so no images can be generated")
    total = int(np.prod(shape))
    for first in range(0, len(prefixes), config.batch):
        sub_pixels = [prefix.tolist() for prefix in prefixes[first : first + config.batch]]
        if len({len(values) for values in sub_pixels}) > 1:
            raise ValueError("all images of a batch need prefixes of the same length")
        for row, token in generate(
            loaded.model, [[0, *values] for values in sub_pixels], total - len(sub_pixels[0]),
            config.sampling, seed=config.seed, context=config.context, first_row=first,
            vocab_size=256,
        ):  # fmt: skip
            sub_pixels[row].append(token)
            complete = len(sub_pixels[row]) == total
            image = np.array(sub_pixels[row], np.uint8).reshape(shape) if complete else None
            yield first + row, image


def mask_below(image: ImageArray, rows: int) -> ImageArray:
    """Return the image with everything below its first `rows` rows in gray."""
    masked = np.full_like(image, GRAY)
    masked[:rows] = image[:rows]
    return masked
