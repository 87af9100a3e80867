import io
import tarfile
import tempfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hg_scale.data import shards as shards_module
from hg_scale.data.errors import DataError
from hg_scale.data.index import Index, Members, pack_offsets, read_index
from hg_scale.data.preparation import shard_writer
from hg_scale.data.preparation.shard_writer import SplitWriter
from hg_scale.data.shards import (
    RetryPolicy,
    ShardFile,
    ShardReader,
    SplitReader,
    check_shard_checksum,
)
from hg_scale.data.tokenizer import ByteTokenizer
from tests.data.conftest import TEXT
from tests.data.servers import serve

SHARD = 3000  # tokens: five members of 512 and one of 440


def shard_path(index, split="train", number=0):
    shard = index.splits[split].shards[number]
    return Path(index.location) / shard.file, shard


def open_shard(index, shard, retry_policy=RetryPolicy()):  # noqa: B008
    return ShardReader(ShardFile.from_index(index, shard), retry_policy)


def read_all(index, shard):
    return open_shard(index, shard).read(0, shard.tokens)


def spans(loaded):
    return [(span.start, span.stop) for span in loaded.unusable]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(shards_module, "_BACK_OFF", (0.0, 0.0))


def test_shards_hold_the_text_in_order(index):
    shards = index.splits["train"].shards
    assert [shard.tokens for shard in shards] == [3000] * 30 + [3]
    assert shards[0].members.tokens == [512] * 5 + [440]
    assert b"".join(read_all(index, shard).tobytes() for shard in shards) == TEXT[:90_003]
    for shard in shards:
        check_shard_checksum(index, shard)


def test_offsets_point_at_tar_headers(index):
    path, shard = shard_path(index)
    with tarfile.open(path) as archive:
        assert [member.offset for member in archive] == shard.members.offsets
        assert {(m.mtime, m.uid, m.gid, m.mode) for m in archive.getmembers()} == {(0, 0, 0, 0o644)}
    assert path.stat().st_size == shard.file_bytes


def test_plain_webdataset_reads_the_shards(index):
    path, shard = shard_path(index)
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples][:2] == [
        "train-00000-000000",
        "train-00000-000001",
    ]
    assert np.concatenate([sample["npy"] for sample in samples]).tobytes() == TEXT[:3000]


@pytest.mark.parametrize("scheme", ["local", "file", "pipe", "http"])
def test_every_scheme_reads_the_same_tokens(index, scheme):
    with serve(index.location) as (url, requests):
        location = {
            "local": index.location,
            "file": f"file://{index.location}",
            "pipe": f"pipe:cat {index.location}/{{}}",
            "http": url,
        }[scheme]
        remote = read_index(location)
        shard = remote.splits["train"].shards[1]
        reader = open_shard(remote, shard)
        for start, stop in [(1500, 2100), (2099, 2999), (10, 20), (600, 601), (2990, 3000)]:
            assert reader.read(start, stop).tobytes() == TEXT[3000 + start : 3000 + stop]
        check_shard_checksum(remote, shard)
    assert not requests or requests[shard.file] == 3  # forward, back to 10, and the checksum


def test_split_reader_reads_across_shards(index):
    reader = SplitReader(index, "train")
    for start, stop in [(0, 1), (2999, 3001), (500, 9500), (90_000, 90_003)]:
        assert reader.read(start, stop).tobytes() == TEXT[start:stop]


@pytest.mark.parametrize("keep", [0, 300, 700, 1600, 3000])
@pytest.mark.parametrize("scheme", ["local", "pipe"])
def test_truncated_shard_is_usable_up_to_the_end(writable, keep, scheme):
    path, shard = shard_path(writable)
    path.write_bytes(path.read_bytes()[:keep])
    if scheme == "pipe":
        writable._location = f"pipe:cat {writable.location}/{{}}"
    with pytest.raises(DataError, match=rf"train-00000\.tar: .*{shard.file_bytes} bytes") as caught:
        read_all(writable, shard)
    assert "\n" not in str(caught.value) and "prepare the data again" in str(caught.value)
    with pytest.raises(DataError, match=f"{keep} bytes with sha256"):
        check_shard_checksum(writable, shard)
    # The members before the end can be used, and nothing else.
    complete = sum(offset + 1152 <= keep for offset in shard.members.offsets)
    loaded = open_shard(writable, shard).load(0, SHARD)
    assert spans(loaded)[0][0] == 512 * complete and spans(loaded)[-1][1] == SHARD
    assert loaded.tokens[: 512 * complete].tobytes() == TEXT[: 512 * complete]
    assert not loaded.tokens[512 * complete :].any()


def test_shard_truncated_between_members(writable):
    path, shard = shard_path(writable)
    path.write_bytes(path.read_bytes()[: shard.members.offsets[2]])
    with pytest.raises(DataError, match=r"train-00000\.tar: cannot be read at member 2"):
        read_all(writable, shard)
    writable._location = f"pipe:cat {writable.location}/{{}}"
    with pytest.raises(DataError, match=r"train-00000\.tar: .*it ends after 2 of 6 members"):
        read_all(writable, shard)


@pytest.mark.parametrize("scheme", ["local", "pipe"])
def test_flipped_bit_makes_one_member_unusable(writable, scheme):
    path, shard = shard_path(writable)
    content = bytearray(path.read_bytes())
    content[shard.members.offsets[1] + 512 + 200] ^= 1
    path.write_bytes(content)
    if scheme == "pipe":
        writable._location = f"pipe:cat {writable.location}/{{}}"
    with pytest.raises(DataError, match=r"train-00000\.tar: member 1: the checksum differs"):
        read_all(writable, shard)
    with pytest.raises(DataError, match="sha256"):
        check_shard_checksum(writable, shard)
    loaded = open_shard(writable, shard).load(100, SHARD)
    assert spans(loaded) == [(412, 924)]
    assert loaded.tokens[:412].tobytes() == TEXT[100:512]
    assert loaded.tokens[924:].tobytes() == TEXT[1024:SHARD]


def test_corrupt_header_of_a_member(writable):
    """A local file is opened at the next member; a pipe cannot be read past the header."""
    path, shard = shard_path(writable)
    content = bytearray(path.read_bytes())
    content[shard.members.offsets[2] + 150] ^= 0xFF
    path.write_bytes(content)
    loaded = open_shard(writable, shard).load(0, SHARD)
    assert spans(loaded) == [(1024, 1536)]
    assert "cannot be read at member 2" in loaded.unusable[0].message
    writable._location = f"pipe:cat {writable.location}/{{}}"
    loaded = open_shard(writable, shard).load(0, SHARD)
    assert [loaded.unusable[0].start, loaded.unusable[-1].stop] == [1024, SHARD]


def test_missing_shard_is_reported(writable):
    path, shard = shard_path(writable)
    path.unlink()
    for read in (read_all, check_shard_checksum):
        with pytest.raises(DataError, match=r"train-00000\.tar: the shard is missing"):
            read(writable, shard)
    assert len(open_shard(writable, shard).load(0, SHARD).unusable) == 6


def test_failing_pipe(writable):
    _, shard = shard_path(writable)
    writable._location = "pipe:exit 7 # {}"
    with pytest.raises(DataError, match=r"at member 0 \(the command ended with exit code 7\)"):
        read_all(writable, shard)


def test_shard_with_the_name_of_another_is_refused(writable):
    path, _ = shard_path(writable)
    path.write_bytes(shard_path(writable, number=1)[0].read_bytes())
    with pytest.raises(DataError, match="member 0 is 'train-00001-000000.npy', not 'train-00000"):
        read_all(writable, writable.splits["train"].shards[0])


def test_wrong_length_type_and_id_are_refused(writable):
    path, shard = shard_path(writable)
    members = shard.members.model_dump()
    shorter = Members(**(members | {"tokens": [511, *members["tokens"][1:]]}))
    wrong = shard.model_copy(update={"members": shorter})
    with pytest.raises(DataError, match=r"member 0 holds uint8 \(512,\), the index has uint8"):
        open_shard(writable, wrong).read(0, 100)

    narrow = writable.tokenizer.model_copy(update={"vocab_size": 100})
    smaller = writable.model_copy(update={"tokenizer": narrow})
    smaller._location = writable.location
    with pytest.raises(DataError, match=r"member 0 holds the id 255, the vocabulary ends at 99"):
        read_all(smaller, shard)

    content = path.read_bytes().replace(b"\x93NUMPY", b"\x93NUMPX", 1)
    path.write_bytes(content)
    member = content[512 : 512 + 128 + 512]
    crc = [zlib.crc32(member), *members["crc32"][1:]]
    wrong = shard.model_copy(update={"members": Members(**(members | {"crc32": crc}))})
    with pytest.raises(DataError, match="member 0: not a .npy array"):
        read_all(writable, wrong)


@pytest.mark.parametrize("name", ["/{outside}/evil.npy", "../evil.npy", "a/../../evil.npy"])
def test_member_with_an_unsafe_name_is_refused_and_not_written(
    writable, tmp_path, monkeypatch, name
):
    path, shard = shard_path(writable)
    name = name.format(outside=str(tmp_path).lstrip("/"))
    with tarfile.open(path) as archive:
        contents = [archive.extractfile(member).read() for member in archive]  # type: ignore
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, content in enumerate(contents):
            header = tarfile.TarInfo(name if number == 0 else f"train-00000-{number:06d}.npy")
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    before = sorted(tmp_path.rglob("*"))
    loaded = open_shard(writable, shard).load(0, SHARD)
    assert spans(loaded) == [(0, 512)]
    assert f"member 0 is {name!r}" in loaded.unusable[0].message
    assert sorted(tmp_path.rglob("*")) == before


def failing_reader(index, monkeypatch, failures, error):
    """A reader whose first `failures` openings raise `error`, and the list of its pauses."""
    pauses, left = [], [failures]
    original = shards_module._Archive.__init__

    def opening(self, *arguments):
        if left[0]:
            left[0] -= 1
            raise error
        original(self, *arguments)

    monkeypatch.setattr(shards_module._Archive, "__init__", opening)
    monkeypatch.setattr(shards_module, "_BACK_OFF", (0.5, 1.5))
    reader = open_shard(index, index.splits["train"].shards[0], RetryPolicy(retries=3))
    reader._closing.wait = lambda seconds: pauses.append(seconds)  # type: ignore[method-assign]
    return reader, pauses


def test_reads_are_retried_with_growing_pauses(index, monkeypatch):
    reader, pauses = failing_reader(index, monkeypatch, 3, OSError(5, "Input/output error"))
    assert reader.read(0, SHARD).tobytes() == TEXT[:SHARD]
    assert pauses == [0.5, 1.0, 1.5]


def test_error_names_the_number_of_tries(index, monkeypatch):
    reader, pauses = failing_reader(index, monkeypatch, 5, OSError(5, "Input/output error"))
    loaded = reader.load(0, SHARD)
    # Four tries for member 0, then one for each until a member reads well.
    assert spans(loaded) == [(0, 512), (512, 1024)] and len(pauses) == 3
    assert "Input/output error" in loaded.unusable[0].message
    assert loaded.unusable[0].message.endswith("(tried 4 times)")
    assert reader._retries_left == 3


def test_corrupt_local_file_is_not_retried(writable, monkeypatch):
    path, shard = shard_path(writable)
    path.write_bytes(path.read_bytes()[:700])
    reader, pauses = failing_reader(writable, monkeypatch, 0, None)
    assert reader.load(0, SHARD).unusable and not pauses


@pytest.mark.parametrize("error", ["refuse", "cut"])
def test_failed_requests_are_retried(index, error):
    shard = index.splits["train"].shards[2]
    fails = lambda name, number: error if name == shard.file and number <= 2 else ""  # noqa: E731
    with serve(index.location, fails) as (url, requests):
        remote = read_index(url)
        reader = open_shard(remote, shard, RetryPolicy(retries=1))
        message = (
            r"\(HTTP status 404 Not Found: check the URL\)"
            if error == "refuse"
            else "tried 2 times"
        )
        with pytest.raises(DataError, match=message):
            reader.read(0, SHARD)
        reader = open_shard(remote, shard, RetryPolicy(retries=3))
        requests.clear()
        assert reader.read(0, SHARD).tobytes() == TEXT[2 * SHARD : 3 * SHARD]
        assert requests[shard.file] == 3


def test_stalled_request_fails_after_the_timeout_and_is_retried(index):
    shard = index.splits["train"].shards[2]
    stalls = lambda name, number: "stall" if name == shard.file and number == 1 else ""  # noqa: E731
    with serve(index.location, stalls) as (url, _):
        remote = read_index(url)
        with pytest.raises(DataError, match=r"no data for 2 seconds"):
            open_shard(remote, shard, RetryPolicy(0, 2)).read(0, SHARD)
    with serve(index.location, stalls) as (url, requests):
        remote = read_index(url)
        reader = open_shard(remote, shard, RetryPolicy(5, 2))
        assert reader.read(0, SHARD).tobytes() == TEXT[2 * SHARD : 3 * SHARD]
        assert requests[shard.file] >= 2


def test_abort_ends_a_read_in_another_thread(index):
    index = Index(**index.model_dump())
    index._location = "pipe:sleep 60; cat {}"
    reader = open_shard(index, index.splits["train"].shards[0])
    found = []
    thread = threading.Thread(target=lambda: found.append(reader.load(0, 10)))
    thread.start()
    while reader._archive is None:
        time.sleep(0.01)
    reader.abort()
    thread.join(20)
    assert not thread.is_alive() and found[0].unusable


def corpus_of_bytes(folder: Path, documents: list[bytes], version: int) -> tuple[Index, np.ndarray]:
    """Write documents of bytes as shards of a format version; return their index and their ids."""
    tokenizer = ByteTokenizer(documents=True)
    ids = np.concatenate(
        [np.append(tokenizer.encode(text), tokenizer.eod) for text in documents]
    ).astype(np.uint16)
    with pytest.MonkeyPatch.context() as patch:
        if version == 1:
            patch.setattr(shard_writer, "stored_dtype", lambda vocab_size, eod: np.dtype("<u2"))
        writer = SplitWriter(folder, "train", tokenizer, chunk_tokens=7, shard_tokens=23)
        for start in range(0, len(ids), 11):
            writer.write(ids[start : start + 11])
        split = writer.close()
    index = Index(
        format_version=version, tool_version="", tokenizer=tokenizer.identity, chunk_tokens=7,
        source={}, splits={"train": split},
    )  # fmt: skip
    (folder / "index.json").write_text(index.text())
    return read_index(folder), ids


@given(
    documents=st.lists(st.binary(max_size=40), min_size=1, max_size=12),
    version=st.sampled_from([1, 2]),
    window=st.integers(1, 30),
)
@settings(deadline=None, max_examples=60)
def test_ends_of_documents_are_read_from_the_index(documents, version, window):
    with tempfile.TemporaryDirectory() as folder:
        index, ids = corpus_of_bytes(Path(folder), documents, version)
        reader = SplitReader(index, "train")
        windows = [
            reader.read(start, min(start + window, len(ids)))
            for start in range(0, len(ids), window)
        ]
        assert np.array_equal(np.concatenate(windows), ids)
        assert all(part.dtype == np.uint16 for part in windows)
        assert index.splits["train"].documents == len(documents)
        assert index.leaves_out_ends == (version == 2)
        with tarfile.open(Path(folder) / "train-00000.tar") as archive:
            member = np.load(io.BytesIO(archive.extractfile(archive.next()).read()))
        assert member.dtype == (np.uint8 if version == 2 else np.uint16)


def test_ends_that_do_not_fit_the_shard_are_refused(tmp_path):
    index, _ = corpus_of_bytes(tmp_path, [b"abc", b"defgh"], 2)
    path, text = tmp_path / "index.json", index.text()
    shard = index.splits["train"].shards[0]
    path.write_text(text.replace(shard.documents, pack_offsets([4, 9])))
    moved = read_index(tmp_path)
    assert moved.identity != index.identity
    with pytest.raises(
        DataError, match=r"train-00000\.tar: member 1 has other ids where documents"
    ):
        SplitReader(moved, "train").read(0, 10)
    path.write_text(text.replace(f'"{shard.documents}"', "null"))
    with pytest.raises(DataError, match=r"train-00000\.tar has no ends of documents"):
        read_index(tmp_path)
