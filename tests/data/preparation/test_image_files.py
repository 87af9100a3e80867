"""Pictures in the formats that pillow reads: read without loss, or refused by name."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.image_files import ExpectedShape, read_picture

COLOUR = np.random.default_rng(3).integers(0, 256, (6, 5, 3), np.uint8)
PICTURE = Image.fromarray(COLOUR)


def save(path, image=PICTURE, **options):
    image.save(path, **options)
    return path


def refused(path) -> str:
    with pytest.raises(DataError) as caught:
        read_picture(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.WebP", {"lossless": True}),
        ("a.bmp", {}),
        ("a.tif", {}),
        ("a.tiff", {"compression": "tiff_lzw"}),
        ("a.ppm", {}),
        ("a.PNG", {"interlace": 1}),
    ],
)
def test_lossless_formats_keep_every_value(tmp_path, name, options):
    picture = read_picture(save(tmp_path / name, **options))
    assert picture == (COLOUR.tobytes(), (6, 5, 3), False)


def test_formats_are_recognised_by_their_contents(tmp_path):
    path = save(tmp_path / "a.png", format="BMP")
    assert read_picture(path).content == COLOUR.tobytes()
    path.write_bytes(b"\x93NUMPY")
    assert "of no supported format" in refused(path)


def test_gray_and_palettes_become_exact(tmp_path):
    gray = PICTURE.convert("L")
    for name in ("a.pgm", "b.gif", "c.webp", "d.tif"):
        options = {"lossless": True} if name == "c.webp" else {}
        picture = read_picture(save(tmp_path / name, gray, **options))
        expected = np.asarray(gray)
        found = np.frombuffer(picture.content, np.uint8).reshape(picture.shape)
        assert picture.shape[2] == (3 if name in ("b.gif", "c.webp") else 1)
        assert all(np.array_equal(found[..., c], expected) for c in range(picture.shape[2]))
    flat = PICTURE.convert("P")
    assert read_picture(save(tmp_path / "e.gif", flat)).content == flat.convert("RGB").tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_orientations_are_applied(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    options = {"exif": exif} | ({"lossless": True} if name == "a.webp" else {})
    plain = {"lossless": True} if name == "a.webp" else {}
    stored = read_picture(save(tmp_path / f"plain-{name}", **plain))
    assert stored.shape == (6, 5, 3)
    expected = Image.frombytes("RGB", (5, 6), stored.content)
    expected.getexif()[274] = orientation
    upright = ImageOps.exif_transpose(expected)
    path = save(tmp_path / name, **options)
    shape = (5, 6, 3) if orientation > 4 else (6, 5, 3)
    picture = read_picture(path, ExpectedShape(shape, "b.png"))
    assert picture == (upright.tobytes(), shape, orientation > 1)


def with_chunk(path, kind: bytes, data: bytes) -> None:
    """Insert a chunk into a PNG, before its pixels."""
    content = path.read_bytes()
    chunk = struct.pack(">I", len(data)) + kind + data
    chunk += struct.pack(">I", zlib.crc32(kind + data))
    at = content.index(b"IDAT") - 4
    path.write_bytes(content[:at] + chunk + content[at:])


@pytest.mark.parametrize(
    ("mode", "key"), [("RGB", bytes(6)), ("L", bytes(2)), ("P", b"\x80"), ("P", b"\xff")]
)
def test_a_trns_chunk_is_transparency(tmp_path, mode, key):
    path = save(tmp_path / "a.png", PICTURE.convert(mode))
    with_chunk(path, b"tRNS", key)
    assert f"is {mode} with transparency" in refused(path)


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.png", "RGBA", {}),
        ("a.png", "LA", {}),
        ("a.webp", "RGBA", {"lossless": True}),
        ("a.tif", "RGBA", {}),
        ("a.tif", "LA", {}),
        ("a.gif", "P", {"transparency": 0}),
        ("a.bmp", "RGBA", {}),
    ],
)
def test_transparency_is_refused(tmp_path, name, mode, options):
    image = PICTURE.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(100)
    assert "with transparency" in refused(save(tmp_path / name, image, **options))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_several_frames_are_refused(tmp_path, name):
    second = Image.fromarray(255 - COLOUR)
    path = save(tmp_path / name, save_all=True, append_images=[second])
    assert "has 2 frames or pages, expected one" in refused(path)


def test_several_images_in_a_ppm_are_refused(tmp_path):
    path = save(tmp_path / "a.ppm")
    content = path.read_bytes()
    path.write_bytes(content + content)
    assert "several images" in refused(path)
    path.write_bytes(content + b"\n")
    assert read_picture(path).content == COLOUR.tobytes()


def tiff_of_16_bits() -> bytes:
    """An RGB TIFF of one pixel, which pillow itself does not write."""
    tags = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2),
            (273, 4, 1, 140), (277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, 6)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head.ljust(134, b"\0") + struct.pack("<3H", 16, 16, 16) + bytes(6)


def test_values_of_more_than_8_bits_are_refused(tmp_path):
    (tmp_path / "rgb.tif").write_bytes(tiff_of_16_bits())
    assert "is 16 bits per channel" in refused(tmp_path / "rgb.tif")
    (tmp_path / "a.ppm").write_bytes(b"P6 1 1 65535 " + bytes(6))
    assert "16 bits per channel" in refused(tmp_path / "a.ppm")
    assert "16" in refused(save(tmp_path / "a.tif", Image.fromarray(np.zeros((4, 4), np.uint16))))
    assert "16" in refused(save(tmp_path / "b.png", Image.fromarray(np.zeros((4, 4), np.uint16))))
    assert "bits" in refused(
        save(tmp_path / "c.tif", Image.fromarray(np.zeros((4, 4), np.float32)))
    )
    assert "is CMYK" in refused(save(tmp_path / "d.jpg", PICTURE.convert("CMYK")))


def test_any_error_of_a_decoder_names_the_file(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png")
    with_chunk(path, b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 26)))
    assert "Decompressed data too large" in refused(path)
    path = save(tmp_path / "b.png")
    for error in (MemoryError(), struct.error("x\ny"), KeyError("z"), RecursionError("deep")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(ImageOps, "exif_transpose", fail)
        assert "cannot be read as an image (" in refused(path)


def test_bombs_are_refused_before_they_are_decoded(tmp_path):
    path = tmp_path / "a.ppm"
    path.write_bytes(b"P6 20000 20000 255\n")
    assert "exceeds limit" in refused(path)
    path.write_bytes(b"P6 10000 9000 255\n")  # pillow only warns of it
    assert "exceeds limit" in refused(path)
    path.write_bytes(b"P6 9000 9000 255\n")
    with pytest.raises(DataError, match=r"9000 x 9000 pixels of 3 channels, but b\.png has 6 x 5"):
        read_picture(path, ExpectedShape((6, 5, 3), "b.png"))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["png", "jpeg", "webp", "gif", "bmp", "tiff", "ppm"]), st.data())
def test_corrupt_files_are_read_or_refused_in_a_line(tmp_path_factory, kind, data):
    path = tmp_path_factory.mktemp("corrupt") / f"a.{kind}"
    content = bytearray(save(path, format=kind).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        picture = read_picture(path)
    except DataError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    else:
        assert len(picture.content) == np.prod(picture.shape)
