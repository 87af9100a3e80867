import io
import tarfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset

from hg_scale.data import shards as shards_module
from hg_scale.data.errors import DataError
from hg_scale.data.index import Index, Members, read_index
from hg_scale.data.shards import RetryPolicy, ShardFile, ShardReader, SplitReader, check_shard
from tests.data.conftest import TEXT
from tests.data.servers import serve

SHARD = 3000  # tokens: five members of 512 and one of 440


def shard_path(index, split="train", number=0):
    shard = index.splits[split].shards[number]
    return Path(index.location) / shard.file, shard


def open_shard(index, shard, patience=RetryPolicy()):  # noqa: B008
    return ShardReader(ShardFile.of(index, shard), patience)


def read_all(index, shard):
    return open_shard(index, shard).read(0, shard.tokens)


def spans(loaded):
    return [(fault.start, fault.stop) for fault in loaded.faults]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(shards_module, "_BACK_OFF", (0.0, 0.0))


def test_shards_hold_the_text_in_order(index):
    shards = index.splits["train"].shards
    assert [shard.tokens for shard in shards] == [3000] * 30 + [3]
    assert shards[0].members.tokens == [512] * 5 + [440]
    assert b"".join(read_all(index, shard).tobytes() for shard in shards) == TEXT[:90_003]
    for shard in shards:
        check_shard(index, shard)


def test_offsets_point_at_tar_headers(index):
    path, shard = shard_path(index)
    with tarfile.open(path) as archive:
        assert [member.offset for member in archive] == shard.members.offsets
        assert {(m.mtime, m.uid, m.gid, m.mode) for m in archive.getmembers()} == {(0, 0, 0, 0o644)}
    assert path.stat().st_size == shard.file_bytes


def test_webdataset_reads_them_by_itself(index):
    path, shard = shard_path(index)
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples][:2] == [
        "train-00000-000000",
        "train-00000-000001",
    ]
    assert np.concatenate([sample["npy"] for sample in samples]).tobytes() == TEXT[:3000]


@pytest.mark.parametrize("scheme", ["local", "file", "pipe", "http"])
def test_the_same_through_every_scheme(index, scheme):
    with serve(index.location) as (url, asked):
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
        check_shard(remote, shard)
    assert not asked or asked[shard.file] == 3  # front to back, back to 10, and the check


def test_spans_across_shards(index):
    reader = SplitReader(index, "train")
    for start, stop in [(0, 1), (2999, 3001), (500, 9500), (90_000, 90_003)]:
        assert reader.read(start, stop).tobytes() == TEXT[start:stop]


@pytest.mark.parametrize("keep", [0, 300, 700, 1600, 3000])
@pytest.mark.parametrize("scheme", ["local", "pipe"])
def test_truncated_shard(copied, keep, scheme):
    path, shard = shard_path(copied)
    path.write_bytes(path.read_bytes()[:keep])
    if scheme == "pipe":
        copied._location = f"pipe:cat {copied.location}/{{}}"
    with pytest.raises(DataError, match=rf"train-00000\.tar: .*{shard.file_bytes} bytes") as caught:
        read_all(copied, shard)
    assert "\n" not in str(caught.value) and "prepare the data again" in str(caught.value)
    with pytest.raises(DataError, match=f"{keep} bytes with sha256"):
        check_shard(copied, shard)
    # What lies before the break can still be used, and nothing else.
    whole = sum(offset + 1152 <= keep for offset in shard.members.offsets)
    loaded = open_shard(copied, shard).load(0, SHARD)
    assert spans(loaded)[0][0] == 512 * whole and spans(loaded)[-1][1] == SHARD
    assert loaded.tokens[: 512 * whole].tobytes() == TEXT[: 512 * whole]
    assert not loaded.tokens[512 * whole :].any()


def test_truncated_between_members(copied):
    path, shard = shard_path(copied)
    path.write_bytes(path.read_bytes()[: shard.members.offsets[2]])
    with pytest.raises(DataError, match=r"train-00000\.tar: cannot be read at member 2"):
        read_all(copied, shard)
    copied._location = f"pipe:cat {copied.location}/{{}}"
    with pytest.raises(DataError, match=r"train-00000\.tar: .*it ends after 2 of 6 members"):
        read_all(copied, shard)


@pytest.mark.parametrize("scheme", ["local", "pipe"])
def test_flipped_bit(copied, scheme):
    path, shard = shard_path(copied)
    content = bytearray(path.read_bytes())
    content[shard.members.offsets[1] + 512 + 200] ^= 1
    path.write_bytes(content)
    if scheme == "pipe":
        copied._location = f"pipe:cat {copied.location}/{{}}"
    with pytest.raises(DataError, match=r"train-00000\.tar: member 1: the checksum differs"):
        read_all(copied, shard)
    with pytest.raises(DataError, match="sha256"):
        check_shard(copied, shard)
    loaded = open_shard(copied, shard).load(100, SHARD)
    assert spans(loaded) == [(412, 924)]
    assert loaded.tokens[:412].tobytes() == TEXT[100:512]
    assert loaded.tokens[924:].tobytes() == TEXT[1024:SHARD]


def test_broken_header_of_a_member(copied):
    """A local file is entered behind it; what comes through a pipe is lost from there on."""
    path, shard = shard_path(copied)
    content = bytearray(path.read_bytes())
    content[shard.members.offsets[2] + 150] ^= 0xFF
    path.write_bytes(content)
    loaded = open_shard(copied, shard).load(0, SHARD)
    assert spans(loaded) == [(1024, 1536)]
    assert "cannot be read at member 2" in loaded.faults[0].message
    copied._location = f"pipe:cat {copied.location}/{{}}"
    loaded = open_shard(copied, shard).load(0, SHARD)
    assert [loaded.faults[0].start, loaded.faults[-1].stop] == [1024, SHARD]


def test_missing_shard(copied):
    path, shard = shard_path(copied)
    path.unlink()
    for read in (read_all, check_shard):
        with pytest.raises(DataError, match=r"train-00000\.tar: the shard is missing"):
            read(copied, shard)
    assert len(open_shard(copied, shard).load(0, SHARD).faults) == 6


def test_failing_pipe(copied):
    _, shard = shard_path(copied)
    copied._location = "pipe:exit 7 # {}"
    with pytest.raises(DataError, match=r"at member 0 \(the command ended with exit code 7\)"):
        read_all(copied, shard)


def test_another_shard_under_the_name(copied):
    path, _ = shard_path(copied)
    path.write_bytes(shard_path(copied, number=1)[0].read_bytes())
    with pytest.raises(DataError, match="member 0 is 'train-00001-000000.npy', not 'train-00000"):
        read_all(copied, copied.splits["train"].shards[0])


def test_wrong_length_type_and_id(copied):
    path, shard = shard_path(copied)
    members = shard.members.model_dump()
    shorter = Members(**(members | {"tokens": [511, *members["tokens"][1:]]}))
    wrong = shard.model_copy(update={"members": shorter})
    with pytest.raises(DataError, match=r"member 0 holds uint8 \(512,\), the index says uint8"):
        open_shard(copied, wrong).read(0, 100)

    narrow = copied.tokenizer.model_copy(update={"vocab_size": 100})
    smaller = copied.model_copy(update={"tokenizer": narrow})
    smaller._location = copied.location
    with pytest.raises(DataError, match=r"member 0 holds the id 255, the vocabulary ends at 99"):
        read_all(smaller, shard)

    content = path.read_bytes().replace(b"\x93NUMPY", b"\x93NUMPX", 1)
    path.write_bytes(content)
    member = content[512 : 512 + 128 + 512]
    crc = [zlib.crc32(member), *members["crc32"][1:]]
    wrong = shard.model_copy(update={"members": Members(**(members | {"crc32": crc}))})
    with pytest.raises(DataError, match="member 0: not a .npy array"):
        read_all(copied, wrong)


@pytest.mark.parametrize("name", ["/{outside}/evil.npy", "../evil.npy", "a/../../evil.npy"])
def test_a_member_is_never_written_anywhere(copied, tmp_path, monkeypatch, name):
    """Its content may be right; under another name than the index's it is a fault."""
    path, shard = shard_path(copied)
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
    loaded = open_shard(copied, shard).load(0, SHARD)
    assert spans(loaded) == [(0, 512)]
    assert f"member 0 is {name!r}" in loaded.faults[0].message
    assert sorted(tmp_path.rglob("*")) == before


def counted(index, monkeypatch, failures, error):
    """Local shards whose first `failures` openings raise `error`. The pauses made."""
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


def test_reads_are_tried_again_after_longer_and_longer_pauses(index, monkeypatch):
    reader, pauses = counted(index, monkeypatch, 3, OSError(5, "Input/output error"))
    assert reader.read(0, SHARD).tobytes() == TEXT[:SHARD]
    assert pauses == [0.5, 1.0, 1.5]


def test_then_the_fault_says_how_often(index, monkeypatch):
    reader, pauses = counted(index, monkeypatch, 5, OSError(5, "Input/output error"))
    loaded = reader.load(0, SHARD)
    # Four tries for member 0; then one for each, until a member reads well.
    assert spans(loaded) == [(0, 512), (512, 1024)] and len(pauses) == 3
    assert "Input/output error" in loaded.faults[0].message
    assert loaded.faults[0].message.endswith("(tried 4 times)")
    assert reader._tries == 3


def test_what_a_local_file_holds_is_not_tried_again(copied, monkeypatch):
    path, shard = shard_path(copied)
    path.write_bytes(path.read_bytes()[:700])
    reader, pauses = counted(copied, monkeypatch, 0, None)
    assert reader.load(0, SHARD).faults and not pauses


@pytest.mark.parametrize("trouble", ["refuse", "cut"])
def test_a_server_that_fails_at_first(index, trouble):
    shard = index.splits["train"].shards[2]
    fails = lambda name, number: trouble if name == shard.file and number <= 2 else ""  # noqa: E731
    with serve(index.location, fails) as (url, asked):
        remote = read_index(url)
        reader = open_shard(remote, shard, RetryPolicy(retries=1))
        message = r"exit code 22\)" if trouble == "refuse" else "tried 2 times"
        with pytest.raises(DataError, match=message):
            reader.read(0, SHARD)
        reader = open_shard(remote, shard, RetryPolicy(retries=3))
        asked.clear()
        assert reader.read(0, SHARD).tobytes() == TEXT[2 * SHARD : 3 * SHARD]
        assert asked[shard.file] == 3


def test_a_server_that_stands_still(index):
    """The read fails after the time-out and is tried again."""
    shard = index.splits["train"].shards[2]
    stalls = lambda name, number: "stall" if name == shard.file and number == 1 else ""  # noqa: E731
    with serve(index.location, stalls) as (url, _):
        remote = read_index(url)
        with pytest.raises(DataError, match=r"no data for 2 seconds"):
            open_shard(remote, shard, RetryPolicy(0, 2)).read(0, SHARD)
    with serve(index.location, stalls) as (url, asked):
        remote = read_index(url)
        reader = open_shard(remote, shard, RetryPolicy(5, 2))
        assert reader.read(0, SHARD).tobytes() == TEXT[2 * SHARD : 3 * SHARD]
        assert asked[shard.file] >= 2


def test_a_read_can_be_ended_from_another_thread(index):
    index = Index(**index.model_dump())
    index._location = "pipe:sleep 60; cat {}"
    reader = open_shard(index, index.splits["train"].shards[0])
    found = []
    thread = threading.Thread(target=lambda: found.append(reader.load(0, 10)))
    thread.start()
    while reader._archive is None:
        time.sleep(0.01)
    reader.kill()
    thread.join(20)
    assert not thread.is_alive() and found[0].faults
