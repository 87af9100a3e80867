"""Generation of text and images with models built in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hg_scale.config.schema import ModelConfig
from hg_scale.data.index import Index
from hg_scale.data.inspection import printable
from hg_scale.data.preparation.images import ImageCorpus
from hg_scale.data.preparation.in_order import Preparation, prepare_bytes
from hg_scale.data.preparation.shuffled import Job, prepare
from hg_scale.data.preparation.tokenizer_training import TokenizerTraining, train_tokenizer
from hg_scale.data.progress import ProgressBar
from hg_scale.data.tokenizer import ByteTokenizer, SentencePieceTokenizer
from hg_scale.errors import UserError
from hg_scale.evaluation.generation import (
    Detokenizer,
    GenerationConfig,
    TextChunk,
    generate_images,
    generate_texts,
    in_prompt_order,
    mask_below,
)
from hg_scale.evaluation.loaded_model import LoadedModel
from hg_scale.evaluation.pictures import GAP, read_images, write_grid
from hg_scale.model.hourglass import Hourglass
from hg_scale.model.sampling import Sampling

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 4, 6, 3), np.uint8)


def loaded_model(index: Index, **changes: Any) -> LoadedModel:
    """A model with initial weights, for a corpus."""
    sizes = {"hierarchy": "1@1 1@3 1@1", "d_model": 32, "heads": 2, "d_ff": 64}
    config = ModelConfig(**{**sizes, "vocab_size": index.vocab_size, "sequence_length": 72,
                            **changes})  # fmt: skip
    model = Hourglass(config)
    return LoadedModel(model.eval(), Path("checkpoint"), 0, index, index.open_tokenizer)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("documents")
    (folder / "in").mkdir()
    for number in range(20):
        (folder / "in" / f"{number}.txt").write_text("the quick brown fox. " * 20)
    return prepare_bytes(Preparation(folder / "in", folder / "out"))[0]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("pictures")
    np.save(folder / "in.npy", IMAGES)
    corpus = ImageCorpus((folder / "in.npy",), fractions=(0.8, 0.1, 0.1))
    return prepare(Job(corpus, (folder / "in.npy",), folder / "out"), ProgressBar())[0]


@given(st.text())
def test_detokenizer_emits_complete_characters(text: str) -> None:
    """Byte by byte: no replacement character, and each character with its last byte."""
    detokenizer = Detokenizer(ByteTokenizer(documents=True))
    decoded = ""
    for number, byte in enumerate(data := text.encode()):
        decoded += detokenizer.add(byte)
        assert data[: number + 1].startswith(decoded.encode())
        assert len(data[: number + 1]) - len(decoded.encode()) < 4
    assert decoded + detokenizer.finish() == text


def test_text_that_ends_inside_a_character_ends_with_a_replacement_character() -> None:
    detokenizer = Detokenizer(ByteTokenizer(documents=True))
    assert detokenizer.add(0xE2) + detokenizer.add(0x82) == ""
    assert detokenizer.add(256) == ""  # the end of the document
    assert detokenizer.finish() == "\N{REPLACEMENT CHARACTER}"


def test_detokenizer_decodes_sentencepiece_tokens(tmp_path: Path) -> None:
    text = "größer ▁ als 5 €, „so“ 😀.\n"
    (tmp_path / "text").write_text(text * 100)
    job = TokenizerTraining((tmp_path / "text",), tmp_path / "tok.model", 290, "bpe")
    train_tokenizer(job, ProgressBar())
    tokenizer = SentencePieceTokenizer.read(job.output, documents=True)
    detokenizer = Detokenizer(tokenizer)
    decoded = [detokenizer.add(token) for token in tokenizer.encode(text + "↯").tolist()]
    assert "".join(decoded) + detokenizer.finish() == text + "↯"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(decoded)


def test_control_characters_are_made_visible() -> None:
    assert printable("a\x1b[2J\tb\n\x7fä") == "a␛[2J\tb\n␡ä"


def test_in_prompt_order_yields_one_text_after_the_other() -> None:
    chunks = [
        TextChunk(1, "x"), TextChunk(0, "a"), TextChunk(1, "y", True), TextChunk(0, "b"),
        TextChunk(2, "u"), TextChunk(0, "c", True), TextChunk(2, "v", True),
    ]  # fmt: skip
    ordered = in_prompt_order(iter(chunks))
    assert next(ordered) == TextChunk(0, "a")  # without waiting for the rest
    assert "".join(chunk.text for chunk in ordered) == "bcxyuv"


def texts(model: LoadedModel, prompts: list[bytes], config: GenerationConfig) -> list[str]:
    generated = [""] * len(prompts)
    for chunk in generate_texts(model, prompts, config):
        generated[chunk.row] += chunk.text
    return generated


def test_texts_do_not_depend_on_the_batch_size(documents: Index) -> None:
    model, prompts = (
        loaded_model(documents),
        [b"", b"the", b"a quick brown", "größe".encode(), b"the"],
    )
    one, three, all_ = (
        texts(model, prompts, GenerationConfig(Sampling(0.9, top_p=0.95), 90, seed=3, batch=batch))
        for batch in (1, 3, 5)
    )
    assert one == three == all_
    assert one[1] != one[4]  # a repeated prompt gives another text
    other = texts(model, prompts, GenerationConfig(Sampling(0.9, top_p=0.95), 90, seed=4))
    assert other[0] != one[0]


def test_text_ends_at_the_end_of_document_token(documents: Index) -> None:
    """A model that predicts nothing but the end of the document."""
    model = loaded_model(documents)
    model.model.get_parameter("head.linear.bias").data[256] = 1e4
    chunks = list(generate_texts(model, [b"the", b""], GenerationConfig(Sampling(), 50)))
    assert chunks == [TextChunk(0, "", True), TextChunk(1, "", True)]


def test_padded_vocabulary_ids_are_not_sampled(documents: Index) -> None:
    model = loaded_model(documents, vocab_size=320)
    model.model.get_parameter("head.linear.bias").data[257:] = 1e4
    assert len(texts(model, [b"a"], GenerationConfig(Sampling(), 20))[0]) > 0


@pytest.mark.parametrize("kept", [0, 2])
def test_images_keep_their_prefix(pictures: Index, kept: int) -> None:
    model = loaded_model(pictures)
    prefixes = [image[:kept].reshape(-1) for image in IMAGES[:3]]
    steps = list(generate_images(model, prefixes, GenerationConfig(Sampling(), 0, batch=2)))
    assert len(steps) == 3 * (72 - kept * 18)
    images = {row: image for row, image in steps if image is not None}
    assert sorted(images) == [0, 1, 2]
    for row, image in images.items():
        assert image.shape == (4, 6, 3) and (image[:kept] == IMAGES[row][:kept]).all()
        assert (image[kept:] != IMAGES[row][kept:]).any()


def test_generation_of_the_wrong_kind_is_refused(documents: Index, pictures: Index) -> None:
    with pytest.raises(
        UserError, match="contains images, so no text can be generated; generate images with"
    ):
        next(generate_texts(loaded_model(pictures), [b""], GenerationConfig(Sampling(), 1)))
    with pytest.raises(UserError, match="contains text"):
        next(generate_images(loaded_model(documents), [IMAGES[0]], GenerationConfig(Sampling(), 1)))


def test_images_are_read_from_files_and_written_as_a_grid(tmp_path: Path) -> None:
    for number in range(2):
        Image.fromarray(IMAGES[number]).save(tmp_path / f"{number}.png")
    np.save(tmp_path / "more.npy", IMAGES[2:5])
    paths = [tmp_path / "0.png", tmp_path / "1.png", tmp_path / "more.npy"]
    images = read_images(paths, (4, 6, 3), 9)
    assert (np.stack(images) == IMAGES[:5]).all()
    write_grid(tmp_path / "page.png", [images[:2], [images[2], mask_below(images[3], 1)]])
    page = np.asarray(Image.open(tmp_path / "page.png"))
    zoom = 10  # 64 pixels // 6
    assert page.shape == (2 * (4 * zoom + GAP) + GAP, 2 * (6 * zoom + GAP) + GAP, 3)
    top, left = GAP + 4 * zoom + GAP, GAP + 6 * zoom + GAP
    assert (page[GAP : GAP + 40 : zoom, left : left + 60 : zoom] == IMAGES[1]).all()
    part = page[top : top + 40 : zoom, left : left + 60 : zoom]
    assert (part[:1] == IMAGES[3][:1]).all() and (part[1:] == 128).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.png", "cannot be read"), ("text.txt", "not an image"), ("large.npy", "has shape")],
)
def test_unusable_images_are_refused(tmp_path: Path, name: str, message: str) -> None:
    np.save(tmp_path / "large.npy", np.zeros((1, 8, 8), np.uint8))
    with pytest.raises(UserError, match=message):
        read_images([tmp_path / name], (4, 6, 3), 9)


def test_too_many_images_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "many.npy", np.zeros((10, 4, 6, 3), np.uint8))
    with pytest.raises(UserError, match="more than 9 images; give a file with fewer"):
        read_images([tmp_path / "many.npy"], (4, 6, 3), 9)


def test_unwritable_grid_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        write_grid(tmp_path / "no" / "page.png", [[IMAGES[0]]])
