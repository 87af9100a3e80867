"""The layout of arrays of images: evident, stated, or refused."""

from __future__ import annotations

import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.image_arrays import ArrayOptions, array_shape, read_array

PIXELS = np.random.default_rng(4).integers(0, 256, (5, 8, 7, 3), np.uint8)


def read(path, layout=None, name=None, begin=0, end=1 << 40):
    options = ArrayOptions(name, layout)
    entries = list(read_array(path, options, begin, end, lambda _: None))
    assert all(shape == array_shape(path, options) for _, _, shape in entries)
    return [np.frombuffer(content, np.uint8).reshape(shape) for _, content, shape in entries]


def saved(tmp_path, array, name="a.npy"):
    with (tmp_path / name).open("wb") as file:
        (np.save if name.lower().endswith("npy") else np.savez)(file, array)
    return tmp_path / name


@pytest.mark.parametrize(
    ("array", "layout", "expected"),
    [
        (PIXELS, None, PIXELS),
        (PIXELS[..., :1], None, PIXELS[..., :1]),
        (PIXELS[0], None, PIXELS[:1]),
        (PIXELS[0, ..., :1], None, PIXELS[:1, ..., :1]),
        (PIXELS[..., 0], None, PIXELS[..., :1]),
        (PIXELS[:1, ..., 0], None, PIXELS[:1, ..., :1]),
        (PIXELS[0, ..., 0], "HW", PIXELS[:1, ..., :1]),
        (PIXELS[:3, ..., 0], "NHW", PIXELS[:3, ..., :1]),
        (PIXELS[0].transpose(2, 0, 1), "CHW", PIXELS[:1]),
        (PIXELS.transpose(0, 3, 1, 2), "NCHW", PIXELS),
        (PIXELS[:, :, :3, 0], "NHW", PIXELS[:, :, :3, :1]),
    ],
)
@pytest.mark.parametrize("name", ["a.npy", "a.NPY", "a.npz"])
def test_layouts(tmp_path, array, layout, expected, name):
    path = saved(tmp_path, np.ascontiguousarray(array), name)
    options = ("arr_0",) if name == "a.npz" else (None,)
    assert np.array_equal(read(path, layout, *options), expected)


@pytest.mark.parametrize(
    ("shape", "choices"),
    [
        ((3, 8, 7), "one of NHW, CHW"),
        ((4, 8, 7), "one of NHW"),
        ((3, 8, 3), "one of NHW, HWC, CHW"),
        ((1, 8, 3), "one of NHW, HWC, CHW"),
        ((8, 7), "one of HW"),
        ((5, 3, 8, 7), "one of NCHW"),
    ],
)
def test_ambiguous_shapes_name_the_option(tmp_path, shape, choices):
    path = saved(tmp_path, np.zeros(shape, np.uint8))
    with pytest.raises(DataError) as caught:
        read(path)
    assert f"uint8 {shape}" in str(caught.value)
    assert f"--array-layout, {choices}" in str(caught.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (PIXELS[..., [0, 1, 2, 0]], "4 channels"),
        (PIXELS[0][..., [0, 1, 2, 0]], "as HWC with 4 channels"),
        (PIXELS.astype(">u2"), "holds >u2|holds uint16"),
        (PIXELS.astype(np.float32), "holds float32"),
        (PIXELS.astype(object), "holds object"),
        (PIXELS > 9, "holds bool"),
        (np.asfortranarray(PIXELS), "in Fortran order"),
        (PIXELS[:0], r"holds uint8 \(0, 8, 7, 3\)"),
        (np.uint8(3), r"holds uint8 \(\)"),
        (np.zeros(9, np.uint8), "reshape it"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    with pytest.raises(DataError, match=message) as caught:
        read(saved(tmp_path, array))
    assert "\n" not in str(caught.value)


def test_a_stated_layout_has_to_fit(tmp_path):
    with pytest.raises(DataError, match="which is not HWC"):
        read(saved(tmp_path, PIXELS), "HWC")
    with pytest.raises(DataError, match="as NCHW it has 8 channels"):
        read(saved(tmp_path, PIXELS), "NCHW")


def test_parts_of_a_channel_first_stack(tmp_path):
    path = saved(tmp_path, np.ascontiguousarray(PIXELS.transpose(0, 3, 1, 2)))
    size, cut = path.stat().st_size, 128 + 2 * 168
    parts = [*read(path, "NCHW", end=cut), *read(path, "NCHW", begin=cut, end=size)]
    assert np.array_equal(parts, PIXELS) and len(read(path, "NCHW", end=cut)) == 2


HEADER = "{'descr': '|u1', 'fortran_order': False, 'shape': "


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode("latin-1")


@pytest.mark.parametrize(
    "content",
    [
        header(HEADER + "(2,"),
        header(HEADER + "(-5, 8, 8, 3)}"),
        header(f"{HEADER}({10**30}, 8, 8, 3)}}"),
        header(f"{HEADER}(1, {10**12}, 8, 3)}}"),
        header("(" * 3000),
        b"\x93NUMPY\x09\x09" + bytes(40),
        b"\x93NUMPY",
        b"",
    ],
)
@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_odd_headers_are_reported_in_a_line(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    if name == "a.npz":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", content)
            archive.writestr("notes.txt", "x")
    with pytest.raises(DataError) as caught:
        read(path, name="arr_0")
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_truncated_or_continued_array_is_refused_at_once(tmp_path):
    path = saved(tmp_path, PIXELS)
    complete = path.read_bytes()
    path.write_bytes(complete[:-200])
    with pytest.raises(DataError, match="ends at image 3 of 5"):
        read(path, end=200)
    path.write_bytes(complete + complete)
    with pytest.raises(DataError, match=r"has 968 bytes after its array"):
        read(path)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=90), st.integers(0, 128))
def test_corrupt_arrays_are_read_or_refused_in_a_line(tmp_path_factory, noise, at):
    path = saved(tmp_path_factory.mktemp("corrupt"), PIXELS)
    content = bytearray(path.read_bytes())
    content[at : at + len(noise)] = noise
    path.write_bytes(content)
    try:
        read(path)
    except DataError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
