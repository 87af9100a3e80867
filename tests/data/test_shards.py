import functools
import http.server
import tarfile
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset

from hg_scale.data.errors import DataError
from hg_scale.data.index import Members, read_index
from hg_scale.data.shards import ShardReader, SplitReader, check_shard, read_members
from tests.data.conftest import TEXT


def shard_path(index, split="train", number=0):
    shard = index.splits[split].shards[number]
    return Path(index.location) / shard.file, shard


def read_all(index, shard):
    return np.concatenate(list(read_members(index, shard)))


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


def test_entering_at_a_member(index):
    _, shard = shard_path(index)
    assert [len(part) for part in read_members(index, shard, 4)] == [512, 440]


@pytest.mark.parametrize("scheme", ["local", "pipe", "http"])
def test_the_same_through_every_scheme(index, scheme):
    handler = functools.partial(_SilentHandler, directory=index.location)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    location = {
        "local": index.location,
        "pipe": f"pipe:cat {index.location}/{{}}",
        "http": f"http://127.0.0.1:{server.server_port}",
    }[scheme]
    try:
        remote = read_index(location)
        reader = ShardReader(remote, remote.splits["train"].shards[1])
        for start, stop in [(1500, 2100), (2099, 2999), (10, 20)]:
            assert reader.read(start, stop).tobytes() == TEXT[3000 + start : 3000 + stop]
    finally:
        server.shutdown()
        server.server_close()


class _SilentHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_spans_across_shards(index):
    reader = SplitReader(index, "train")
    for start, stop in [(0, 1), (2999, 3001), (500, 9500), (90_000, 90_003)]:
        assert reader.read(start, stop).tobytes() == TEXT[start:stop]


@pytest.mark.parametrize("keep", [0, 300, 700, 1600, 3000])
def test_truncated_shard(copied, keep):
    path, shard = shard_path(copied)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"train-00000\.tar: .*{shard.file_bytes} bytes") as caught:
        read_all(copied, shard)
    assert "\n" not in str(caught.value) and "prepare the data again" in str(caught.value)
    with pytest.raises(DataError, match=f"{keep} bytes with sha256"):
        check_shard(copied, shard)


def test_truncated_between_members(copied):
    path, shard = shard_path(copied)
    path.write_bytes(path.read_bytes()[: shard.members.offsets[2]])
    with pytest.raises(DataError, match=r"train-00000\.tar: ends after 2 of 6 members"):
        read_all(copied, shard)


def test_flipped_bit(copied):
    path, shard = shard_path(copied)
    content = bytearray(path.read_bytes())
    content[shard.members.offsets[1] + 512 + 200] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000\.tar: member 1: the checksum differs"):
        read_all(copied, shard)
    with pytest.raises(DataError, match="sha256"):
        check_shard(copied, shard)


def test_missing_shard(copied):
    path, shard = shard_path(copied)
    path.unlink()
    for read in (read_all, check_shard):
        with pytest.raises(DataError, match=r"train-00000\.tar: the shard is missing"):
            read(copied, shard)


def test_failing_pipe(copied):
    _, shard = shard_path(copied)
    copied._location = "pipe:exit 7 # {}"
    with pytest.raises(DataError, match=r"cannot be read at member 0"):
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
        read_all(copied, wrong)

    narrow = copied.tokenizer.model_copy(update={"vocab_size": 100})
    smaller = copied.model_copy(update={"tokenizer": narrow})
    smaller._location = copied.location
    with pytest.raises(DataError, match=r"holds the id 255, the vocabulary ends at 99"):
        read_all(smaller, shard)

    content = path.read_bytes().replace(b"\x93NUMPY", b"\x93NUMPX", 1)
    path.write_bytes(content)
    member = content[512 : 512 + 128 + 512]
    crc = [zlib.crc32(member), *members["crc32"][1:]]
    wrong = shard.model_copy(update={"members": Members(**(members | {"crc32": crc}))})
    with pytest.raises(DataError, match="member 0: not a .npy array"):
        read_all(copied, wrong)
