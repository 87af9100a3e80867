import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from hg_scale.config import load_config
from hg_scale.data.errors import DataError
from hg_scale.data.preparation.image_arrays import ArrayOptions
from hg_scale.data.preparation.images import ImageCorpus
from hg_scale.data.preparation.shuffled import Job, prepare
from hg_scale.data.progress import ProgressBar
from hg_scale.data.shards import SplitReader
from tests.data.preparation.test_in_order import contents
from tests.shared import ROOT

COLOUR = np.random.default_rng(0).integers(0, 256, (40, 6, 5, 3), np.uint8)


def run(source, output, **options):
    corpus = ImageCorpus((source,), **options)
    return prepare(
        Job(corpus, (source,), output, chunk_tokens=300, shard_tokens=900), ProgressBar()
    )


def images_of(index, name):
    """Return the images of a split, (n, H, W, C)."""
    tokens = SplitReader(index, name).read(0, index.splits[name].tokens)
    return tokens.reshape(-1, *index.source["shape"])


def assert_same_images(found, expected):
    assert found.dtype == np.uint8
    assert sorted(image.tobytes() for image in found) == sorted(i.tobytes() for i in expected)


@pytest.mark.parametrize("kind", ["png", "npy", "npz", "packed npz"])
def test_colour_images_are_reproduced(tmp_path, kind):
    (tmp_path / "in").mkdir()
    if kind == "png":
        for number, image in enumerate(COLOUR):
            Image.fromarray(image).save(tmp_path / "in" / f"{number:02d}.PNG")
    elif kind == "npy":
        np.save(tmp_path / "in" / "a.npy", COLOUR[:15])
        np.save(tmp_path / "in" / "b.npy", COLOUR[15:])
    else:
        save = np.savez if kind == "npz" else np.savez_compressed
        save(tmp_path / "in" / "a.npz", images=COLOUR, labels=np.arange(40))
    index, written = run(tmp_path / "in", tmp_path / "out", fractions=(0.7, 0.2, 0.1))
    assert written and index.document_tokens == 90 and index.source["shape"] == [6, 5, 3]
    assert (index.vocab_size, index.eod, index.chunk_tokens) == (256, None, 270)
    splits = [images_of(index, name) for name in index.splits]
    assert [len(images) for images in splits] == [s.documents for s in index.splits.values()]
    assert_same_images(np.concatenate(splits), COLOUR)
    assert not np.array_equal(splits[0], COLOUR[: len(splits[0])])  # shuffled
    for split in index.splits.values():
        assert split.text_bytes == split.tokens
        assert all(shard.tokens % 90 == 0 and not shard.documents for shard in split.shards)
    # Row-major; red, green and blue are adjacent.
    first = SplitReader(index, "train").read(0, 90)
    assert any(np.array_equal(first[:3], image[0, 0]) for image in COLOUR)


def test_an_array_is_read_in_tasks(tmp_path):
    """A large .npy file is split into tasks; each image is in one of them."""
    images = np.random.default_rng(1).integers(0, 256, (3000, 32, 32), np.uint8)
    np.save(tmp_path / "a.npy", images)
    corpus = ImageCorpus((tmp_path / "a.npy",))
    corpus.use_survey(json.loads(json.dumps(corpus.survey())))
    tasks = corpus.tasks()
    assert len(tasks) == 3 and corpus.document_tokens == 1024
    found = [
        bytes(content)
        for task in tasks
        for segment in task.segments
        for _, batch in corpus.documents(segment, tmp_path, lambda count: None)
        for content in batch.documents()
    ]
    assert found == [image.tobytes() for image in images]


def test_gray_images_keep_one_channel(tmp_path):
    digits = load_digits().images.astype(np.uint8)
    np.savez_compressed(tmp_path / "digits.npz", digits)
    command = [sys.executable, str(ROOT / "data_prep" / "prepare_images.py"), "--input",
               str(tmp_path / "digits.npz"), "--output", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "images of 8 x 8 pixels of 1 channel: sequence_length 64" in done.stdout
    index, written = run(tmp_path / "digits.npz", tmp_path / "again")
    assert written and index.document_tokens == 64
    images = np.concatenate([images_of(index, name)[..., 0] for name in index.splits])
    assert_same_images(images, digits)
    assert 1550 < index.splits["train"].documents < 1680


def test_folders_are_splits(tmp_path):
    for name, part in [("train", COLOUR[:30]), ("val", COLOUR[30:])]:
        (tmp_path / "in" / name).mkdir(parents=True)
        np.save(tmp_path / "in" / name / "images.npy", part)
    index, _ = run(tmp_path / "in", tmp_path / "out", fractions=None)
    assert_same_images(images_of(index, "train"), COLOUR[:30])
    assert_same_images(images_of(index, "validation"), COLOUR[30:])
    again, written = run(tmp_path / "in", tmp_path / "out", fractions=None)
    assert again == index and not written


@pytest.mark.parametrize(
    ("mode", "shape"), [("L", (6, 5, 1)), ("RGB", (6, 5, 3)), ("P", (6, 5, 3)), ("1", (6, 5, 1))]
)
def test_picture_modes_convert_without_loss(tmp_path, mode, shape):
    pictures = Image.fromarray(COLOUR[0]).convert(mode)
    (tmp_path / "in").mkdir()
    pictures.save(tmp_path / "in" / "a.png")
    index, _ = run(tmp_path / "in", tmp_path / "out", fractions=(1.0, 0.0, 0.0))
    assert tuple(index.source["shape"]) == shape
    expected = np.asarray(pictures.convert("RGB" if shape[2] == 3 else "L")).reshape(shape)
    assert np.array_equal(images_of(index, "train")[0], expected)


def test_jpeg_keeps_the_decoded_values(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(COLOUR[0]).save(tmp_path / "in" / "a.JPEG")
    index, _ = run(tmp_path / "in", tmp_path / "out", fractions=(1.0, 0.0, 0.0))
    with Image.open(tmp_path / "in" / "a.JPEG") as image:
        assert np.array_equal(images_of(index, "train")[0], np.asarray(image))


def test_pictures_of_another_size_or_kind_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(COLOUR[0]).save(tmp_path / "in" / "a.png")
    second = tmp_path / "in" / "b.png"
    cases = [
        (Image.fromarray(COLOUR[1][:4]), r"b\.png: 4 x 5 pixels of 3 channels, but .*a\.png has 6"),
        (Image.fromarray(COLOUR[1]).convert("L"), r"b\.png: 6 x 5 pixels of 1 channel, but"),
        (Image.fromarray(COLOUR[1]).convert("RGBA"), r"b\.png: is RGBA with transparency"),
        (Image.fromarray(np.zeros((6, 5), np.uint16)), r"b\.png: is 16 bits per channel"),
    ]
    for picture, message in cases:
        picture.save(second)
        with pytest.raises(DataError, match=message):
            run(tmp_path / "in", tmp_path / f"out-{picture.mode}-{picture.height}")
    Image.fromarray(COLOUR[1]).save(second)
    second.write_bytes(second.read_bytes()[:60])
    with pytest.raises(DataError, match=r"b\.png: cannot be read as an image") as caught:
        run(tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": COLOUR.astype(np.int64)}, r"holds a; expected one array"),
        ({"a": COLOUR, "b": COLOUR}, r"holds a, b; expected one array"),
        ({"a": np.zeros((3, 4, 4, 2), np.uint8)}, r"expected uint8 \(N, H, W, 3\)"),
        ({"a": np.asfortranarray(COLOUR)}, "in Fortran order"),
        ({}, "holds nothing; expected one array"),
    ],
)
def test_arrays_that_are_not_images_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        run(tmp_path / "a.npz", tmp_path / "out")


def test_an_array_is_chosen_by_name(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=COLOUR, x_test=COLOUR[:3])
    index, _ = run(tmp_path / "a.npz", tmp_path / "out", array=ArrayOptions("x_test"))
    assert sum(split.documents for split in index.splits.values()) == 3


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_corrupt_arrays_are_reported(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    (np.save if suffix == ".npy" else np.savez)(path, COLOUR)
    complete = path.read_bytes()
    for content in (complete[:-40], b"nothing", complete[:20]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.np.: (cannot be read as an array|ends at image)"):
            run(path, tmp_path / "out")


def test_inputs_without_images_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="no file matches"):
        run(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "b.png").touch()
    with pytest.raises(DataError, match=r"b\.png: is empty"):
        run(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match=r"notes\.txt: not an image"):
        run(tmp_path / "in", tmp_path / "out", include=("*.txt",))


@pytest.mark.parametrize(
    ("name", "side"), [("imagenet32", 32), ("imagenet64", 64), ("cifar10", 32)]
)
def test_a_sequence_of_the_presets_is_one_image(name, side):
    model = load_config(ROOT / "configs" / "paper" / f"{name}.json").model
    assert (model.sequence_length, model.vocab_size) == (3 * side * side, 256)


def test_same_input_same_shards(tmp_path):
    np.save(tmp_path / "a.npy", COLOUR)
    run(tmp_path / "a.npy", tmp_path / "one")
    run(tmp_path / "a.npy", tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
