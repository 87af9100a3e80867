"""Text and images from models in memory."""

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
    Piece,
    draw_images,
    in_order,
    upper_part,
    write_texts,
)
from hg_scale.evaluation.loaded_model import LoadedModel
from hg_scale.evaluation.pictures import GAP, read_images, write_grid
from hg_scale.model.hourglass import Hourglass
from hg_scale.model.initialization import initialize_weights
from hg_scale.model.sampling import Sampling

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 4, 6, 3), np.uint8)


def trained(index: Index, **changes: Any) -> LoadedModel:
    """A model nobody trained, for a corpus."""
    sizes = {"hierarchy": "1@1 1@3 1@1", "d_model": 32, "heads": 2, "d_ff": 64}
    config = ModelConfig(**{**sizes, "vocab_size": index.vocab_size, "sequence_length": 72,
                            **changes})  # fmt: skip
    model = Hourglass(config)
    initialize_weights(list(model.named_parameters()), config, seed=1)
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
def test_characters_come_whole(text: str) -> None:
    """Byte by byte: no replacement character, and each character with its last byte."""
    characters = Detokenizer(ByteTokenizer(documents=True))
    made = ""
    for number, byte in enumerate(data := text.encode()):
        made += characters.add(byte)
        assert data[: number + 1].startswith(made.encode())
        assert len(data[: number + 1]) - len(made.encode()) < 4
    assert made + characters.end() == text


def test_a_text_cut_inside_a_character_says_so() -> None:
    characters = Detokenizer(ByteTokenizer(documents=True))
    assert characters.add(0xE2) + characters.add(0x82) == ""
    assert characters.add(256) == ""  # the end of the document
    assert characters.end() == "\N{REPLACEMENT CHARACTER}"


def test_characters_of_pieces(tmp_path: Path) -> None:
    text = "größer ▁ als 5 €, „so“ 😀.\n"
    (tmp_path / "text").write_text(text * 100)
    job = TokenizerTraining((tmp_path / "text",), tmp_path / "tok.model", 290, "bpe")
    train_tokenizer(job, ProgressBar())
    tokenizer = SentencePieceTokenizer.read(job.output, documents=True)
    characters = Detokenizer(tokenizer)
    pieces = [characters.add(token) for token in tokenizer.encode(text + "↯").tolist()]
    assert "".join(pieces) + characters.end() == text + "↯"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert printable("a\x1b[2J\tb\n\x7fä") == "a␛[2J\tb\n␡ä"


def test_texts_come_one_after_the_other() -> None:
    made = [Piece(1, "x"), Piece(0, "a"), Piece(1, "y", True), Piece(0, "b"), Piece(2, "u"),
            Piece(0, "c", True), Piece(2, "v", True)]  # fmt: skip
    ordered = in_order(iter(made))
    assert next(ordered) == Piece(0, "a")  # as it is made
    assert "".join(piece.text for piece in ordered) == "bcxyuv"


def texts(model: LoadedModel, prompts: list[bytes], how: GenerationConfig) -> list[str]:
    made = [""] * len(prompts)
    for piece in write_texts(model, prompts, how):
        made[piece.row] += piece.text
    return made


def test_texts_do_not_depend_on_the_batch(documents: Index) -> None:
    model, prompts = trained(documents), [b"", b"the", b"a quick brown", "größe".encode(), b"the"]
    one, three, all_ = (
        texts(model, prompts, GenerationConfig(Sampling(0.9, top_p=0.95), 90, seed=3, batch=batch))
        for batch in (1, 3, 5)
    )
    assert one == three == all_
    assert one[1] != one[4]  # the same prompt again is another text
    other = texts(model, prompts, GenerationConfig(Sampling(0.9, top_p=0.95), 90, seed=4))
    assert other[0] != one[0]


def test_a_text_ends_with_its_document(documents: Index) -> None:
    """A model that says nothing but the end of the document."""
    model = trained(documents)
    model.model.get_parameter("head.linear.bias").data[256] = 1e4
    pieces = list(write_texts(model, [b"the", b""], GenerationConfig(Sampling(), 50)))
    assert pieces == [Piece(0, "", True), Piece(1, "", True)]


def test_ids_that_are_no_tokens_are_not_drawn(documents: Index) -> None:
    model = trained(documents, vocab_size=320)
    model.model.get_parameter("head.linear.bias").data[257:] = 1e4
    assert len(texts(model, [b"a"], GenerationConfig(Sampling(), 20))[0]) > 0


@pytest.mark.parametrize("kept", [0, 2])
def test_images_keep_what_is_given(pictures: Index, kept: int) -> None:
    model = trained(pictures)
    given = [image[:kept].reshape(-1) for image in IMAGES[:3]]
    steps = list(draw_images(model, given, GenerationConfig(Sampling(), 0, batch=2)))
    assert len(steps) == 3 * (72 - kept * 18)
    made = {row: image for row, image in steps if image is not None}
    assert sorted(made) == [0, 1, 2]
    for row, image in made.items():
        assert image.shape == (4, 6, 3) and (image[:kept] == IMAGES[row][:kept]).all()
        assert (image[kept:] != IMAGES[row][kept:]).any()


def test_each_kind_of_corpus_has_its_way(documents: Index, pictures: Index) -> None:
    with pytest.raises(UserError, match="holds images"):
        next(write_texts(trained(pictures), [b""], GenerationConfig(Sampling(), 1)))
    with pytest.raises(UserError, match="holds text"):
        next(draw_images(trained(documents), [IMAGES[0]], GenerationConfig(Sampling(), 1)))


def test_images_from_files_and_a_page_of_them(tmp_path: Path) -> None:
    for number in range(2):
        Image.fromarray(IMAGES[number]).save(tmp_path / f"{number}.png")
    np.save(tmp_path / "more.npy", IMAGES[2:5])
    paths = [tmp_path / "0.png", tmp_path / "1.png", tmp_path / "more.npy"]
    images = read_images(paths, (4, 6, 3), 9)
    assert (np.stack(images) == IMAGES[:5]).all()
    write_grid(tmp_path / "page.png", [images[:2], [images[2], upper_part(images[3], 1)]])
    page = np.asarray(Image.open(tmp_path / "page.png"))
    scale = 10  # 64 pixels // 6
    assert page.shape == (2 * (4 * scale + GAP) + GAP, 2 * (6 * scale + GAP) + GAP, 3)
    top, left = GAP + 4 * scale + GAP, GAP + 6 * scale + GAP
    assert (page[GAP : GAP + 40 : scale, left : left + 60 : scale] == IMAGES[1]).all()
    part = page[top : top + 40 : scale, left : left + 60 : scale]
    assert (part[:1] == IMAGES[3][:1]).all() and (part[1:] == 128).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.png", "cannot be read"), ("text.txt", "not an image"), ("large.npy", "has shape")],
)
def test_what_is_no_image_of_the_model(tmp_path: Path, name: str, message: str) -> None:
    np.save(tmp_path / "large.npy", np.zeros((1, 8, 8), np.uint8))
    with pytest.raises(UserError, match=message):
        read_images([tmp_path / name], (4, 6, 3), 9)


def test_no_more_images_than_a_page_shows(tmp_path: Path) -> None:
    np.save(tmp_path / "many.npy", np.zeros((10, 4, 6, 3), np.uint8))
    with pytest.raises(UserError, match="more than 9 images; give a file of those"):
        read_images([tmp_path / "many.npy"], (4, 6, 3), 9)


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        write_grid(tmp_path / "no" / "page.png", [[IMAGES[0]]])
