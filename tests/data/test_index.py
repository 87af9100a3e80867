import base64
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hg_scale.data.errors import DataError
from hg_scale.data.index import locate, pack_offsets, read_index, unpack_offsets
from tests.data.servers import serve


def change_keys(index, **changes):
    """Rewrite index.json with some top-level keys changed."""
    path = Path(index.location) / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_index_read_back_is_equal(index):
    folder = Path(index.location)
    again = read_index(folder / "index.json")
    assert again == index and again.location == str(folder)
    assert (folder / "index.json").read_text() == index.text()
    assert again.identity == index.identity


def test_index_is_read_through_a_pipe(index):
    piped = read_index(f"pipe:cat {index.location}/{{}}")
    assert piped.text() == index.text()
    assert piped.url(piped.splits["train"].shards[3]).endswith("/train-00003.tar")


def test_index_has_one_line_per_shard(index):
    lines = index.text().splitlines()
    assert (
        sum('{"file": ' in line for line in lines)
        == 35
        == sum(len(split.shards) for split in index.splits.values())
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3, "tool_version": "hg_scale 9"}, "format 3 by hg_scale 9.*up to 2"),
        ({"chunk_tokens": 0}, "chunk_tokens: Input should be greater than or equal to 1"),
        ({"colour": 1}, "colour: Extra inputs are not permitted"),
        ({"splits": {"train": {"tokens": 5, "text_bytes": 0, "documents": None, "shards": []}}},
         "splits.train: its shards hold 0 tokens, not 5"),
    ],
)  # fmt: skip
def test_unusable_index_is_refused_in_one_line(writable, changes, message):
    change_keys(writable, **changes)
    with pytest.raises(DataError, match=message) as caught:
        read_index(writable.location)
    assert "\n" not in str(caught.value) and "index.json" in str(caught.value)


def test_wrong_sum_and_unsafe_name_are_refused(writable):
    path = Path(writable.location) / "index.json"
    for old, new, message in [
        ('"tokens": [512, ', '"tokens": [511, ', "shards.0: its members hold 2999, not 3000"),
        ('"train-00000.tar"', '"../train-00000.tar"', "shards.0.file: String should match"),
    ]:
        path.write_text(writable.text().replace(old, new, 1))
        with pytest.raises(DataError, match=message):
            read_index(writable.location)


def test_missing_and_invalid_index_files(tmp_path):
    with pytest.raises(DataError, match=r"index\.json: no such file; name a folder written by"):
        read_index(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_index(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read_index("pipe:exit 3 # {}")


def test_refused_and_stalled_requests_raise_one_line(index):
    refuses = serve(index.location, lambda name, number: "refuse")
    with refuses as (url, _), pytest.raises(DataError) as caught:
        read_index(url)
    reason = "cannot be read (HTTP status 404 Not Found: check the URL); expected the index.json"
    assert str(caught.value).startswith(f"{url}/index.json: {reason}")
    stalls = serve(index.location, lambda name, number: "stall")
    with stalls as (url, _), pytest.raises(DataError) as caught:
        read_index(url, timeout=0.5)
    assert "index.json: cannot be read (no data for 0.5 seconds)" in str(caught.value)
    with serve(index.location) as (url, _):
        assert read_index(url).text() == index.text()


def test_empty_split_is_refused(writable):
    with pytest.raises(DataError, match="the split 'test' is empty; use one of train, validation"):
        writable.split("test")


def test_locate_joins_location_and_file():
    assert locate("corpus", "a.tar") == "corpus/a.tar"
    assert locate("https://host/corpus/", "a.tar") == "https://host/corpus/a.tar"
    assert locate("pipe:ssh host cat /c/{}", "a.tar") == "pipe:ssh host cat /c/a.tar"


@given(st.lists(st.integers(0, 2**31), unique=True).map(sorted))
def test_offsets_survive_packing(offsets):
    assert unpack_offsets(pack_offsets(offsets), len(offsets)).tolist() == offsets


@pytest.mark.parametrize("count", [10_000, 100_000])
def test_packed_offsets_are_compact(count):
    ends = np.cumsum(np.random.default_rng(0).integers(100, 5000, count))
    packed = pack_offsets(ends)
    assert len(packed) < 3.5 * len(ends)
    assert np.array_equal(unpack_offsets(packed, len(ends)), ends)
    # Few are compressed as in earlier versions, so that their index is the same.
    steps = np.diff(ends, prepend=0).astype("<u4").tobytes()
    assert (packed == base64.b64encode(zlib.compress(steps, 9)).decode()) == (count == 10_000)
