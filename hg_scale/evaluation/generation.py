"""What a trained model writes: text as it is made, and images."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hg_scale.data.tokenizer import Tokenizer
from hg_scale.errors import UserError
from hg_scale.evaluation.loaded_model import LoadedModel
from hg_scale.model.decoding import generate
from hg_scale.model.sampling import Sampling

TEMPERATURE = 0.8  # of samples that a summary or a report shows
GRAY = 128  # of what is not given of an image

ImageArray = NDArray[np.uint8]  # (height, width, channels)


@dataclass(frozen=True)
class GenerationConfig:
    """How to write: up to `tokens` a text, `batch` texts at once.

    `context`: tokens that the model sees; None: as many as it was trained on.
    """

    sampling: Sampling
    tokens: int
    seed: int = 1
    batch: int = 8
    context: int | None = None


class Piece(NamedTuple):
    """A few characters, or none, of text `row`; `last` where it ends."""

    row: int
    text: str
    last: bool = False


class Detokenizer:
    """Tokens to whole characters: bytes wait until their character is complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The characters that `token` completes; U+FFFD for what is not UTF-8."""
        return self._utf8.decode(self._tokenizer.decode(np.array([token])))

    def end(self) -> str:
        """What is left, where the text ends inside a character."""
        return self._utf8.decode(b"", final=True)


def write_texts(
    trained: LoadedModel, prompts: Sequence[bytes], how: GenerationConfig
) -> Iterator[Piece]:
    """What follows each prompt, as it is made; rows of a batch take turns.

    A text ends at the end of its document, which is not part of it, or after `how.tokens`. The
    beginning of a prompt is the beginning of a document, where the data has documents.
    """
    if trained.images is not None:
        raise UserError(f"{trained.subject}: holds images; `hg-scale generate` draws them")
    tokenizer = trained.open_tokenizer()
    start = tokenizer.eod or 0
    return write_after(trained, [[start, *tokenizer.encode(p).tolist()] for p in prompts], how)


def write_after(
    trained: LoadedModel, prompts: Sequence[Sequence[int]], how: GenerationConfig
) -> Iterator[Piece]:
    """`write_texts` after tokens, at least one a prompt, as they are."""
    tokenizer = trained.open_tokenizer()
    for first in range(0, len(prompts), how.batch):
        ids = [list(prompt) for prompt in prompts[first : first + how.batch]]
        characters = [Detokenizer(tokenizer) for _ in ids]
        left = [how.tokens] * len(ids)
        for row, token in generate(
            trained.model, ids, how.tokens, how.sampling, seed=how.seed, stop=tokenizer.eod,
            context=how.context, first_row=first, vocab_size=tokenizer.vocab_size,
        ):  # fmt: skip
            left[row] -= 1
            last = token == tokenizer.eod or not left[row]
            text = "" if token == tokenizer.eod else characters[row].add(token)
            yield Piece(first + row, text + (characters[row].end() if last else ""), last)


def write_sample(trained: LoadedModel, tokens: int, seed: int) -> str:
    """Text from the beginning of a document, at TEMPERATURE."""
    how = GenerationConfig(Sampling(TEMPERATURE), tokens, seed)
    return "".join(piece.text for piece in write_texts(trained, [b""], how))


def in_order(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces of one text after another: of the first that is not at its end as they come."""
    turn, waiting = 0, dict[int, list[Piece]]()
    for piece in pieces:
        waiting.setdefault(piece.row, []).append(piece)
        while turn in waiting:
            ready = waiting.pop(turn)
            yield from ready
            if not ready[-1].last:
                break
            turn += 1


def draw_images(
    trained: LoadedModel, given: Sequence[NDArray[np.uint8]], how: GenerationConfig
) -> Iterator[tuple[int, ImageArray | None]]:
    """Go on from the sub-pixels given, (n,) each, to whole images: (row, None) for each sub-pixel
    made, (row, image) for the last of each image."""
    shape = trained.images
    if shape is None:
        raise UserError(f"{trained.subject}: holds text, no images")
    total = int(np.prod(shape))
    for first in range(0, len(given), how.batch):
        made = [pixels.tolist() for pixels in given[first : first + how.batch]]
        if len({len(pixels) for pixels in made}) > 1:
            raise ValueError("all images need as many sub-pixels given")
        for row, token in generate(
            trained.model, [[0, *pixels] for pixels in made], total - len(made[0]), how.sampling,
            seed=how.seed, context=how.context, first_row=first, vocab_size=256,
        ):  # fmt: skip
            made[row].append(token)
            whole = len(made[row]) == total
            image = np.array(made[row], np.uint8).reshape(shape) if whole else None
            yield first + row, image


def upper_part(image: ImageArray, rows: int) -> ImageArray:
    """The first rows of an image, gray below."""
    part = np.full_like(image, GRAY)
    part[:rows] = image[:rows]
    return part
