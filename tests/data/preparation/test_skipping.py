"""Items that cannot be read: what is left out, and what the rest is equal to."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from hg_scale.data.errors import DataError
from hg_scale.data.preparation import corpus as corpus_module
from hg_scale.data.preparation.documents import TextFormat
from hg_scale.data.preparation.images import ImageCorpus
from hg_scale.data.preparation.in_order import Preparation, prepare_bytes
from hg_scale.data.preparation.shuffled import Job, prepare
from hg_scale.data.preparation.skipping import SkipLog, SkippedItem, SkipPolicy, read_list
from hg_scale.data.preparation.text_corpus import TextCorpus
from hg_scale.data.preparation.tokenizer_training import TokenizerTraining, train_tokenizer
from hg_scale.data.progress import ProgressBar
from hg_scale.data.tokenizer import ByteTokenizer
from tests.shared import ROOT

SKIP = SkipPolicy("skip")
GOOD = "".join(json.dumps({"text": f"document {n} " * (n % 5 + 1)}) + "\n" for n in range(400))
BAD_LINES = ['{"text": "cut o', '{"text": 7}', '{"body": "x"}', "[3]", '{"text": "\udcff"}']


def job(source, output, policy=SKIP, **options):
    form = TextFormat(separator=options.pop("separator", None))
    corpus = TextCorpus(
        (source,), ByteTokenizer(documents=True), fractions=(0.8, 0.1, 0.1), format=form, **options
    )
    return Job(corpus, (source,), output, chunk_tokens=512, shard_tokens=4000, policy=policy)


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def equal_without(tmp_path, with_bad, without):
    """Prepare two inputs; return the list of the first, after comparing the shards."""
    made = job(with_bad, tmp_path / "skipped")
    prepare(made, ProgressBar())
    prepare(job(without, tmp_path / "clean", SkipPolicy()), ProgressBar())
    assert shards(tmp_path / "skipped") == shards(tmp_path / "clean") != {}
    assert not (tmp_path / "clean" / "skipped.jsonl").exists()
    found = read_list(tmp_path / "skipped" / "skipped.jsonl")
    assert found == made.log.items
    return found


def lines_with_errors() -> tuple[bytes, bytes, list[int]]:
    """A file with bad lines, the same with spaces in their place, and where they are."""
    bad = [line.encode("utf-8", "surrogateescape") for line in BAD_LINES]
    good = GOOD.encode().splitlines()
    mixed, blank, at, position = [], [], [], 0
    for number, line in enumerate(good):
        if number % 90 == 5:
            at.append(position)
            mixed.append(bad[number // 90])
            blank.append(b" " * len(mixed[-1]))
            position += len(mixed[-1]) + 1
        mixed.append(line)
        blank.append(line)
        position += len(line) + 1
    return b"\n".join(mixed), b"\n".join(blank), at


@pytest.mark.parametrize("packed", [False, True])
def test_bad_lines(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(corpus_module, "_MIN_TASK_BYTES", 1000)
    mixed, blank, at = lines_with_errors()
    for name, content in (("mixed", mixed), ("blank", blank)):
        (tmp_path / name).mkdir()
        name = tmp_path / name / f"a.jsonl{'.gz' * packed}"
        name.write_bytes(gzip.compress(content) if packed else content)
    found = equal_without(tmp_path, tmp_path / "mixed", tmp_path / "blank")
    assert [(item.kind, item.position) for item in found] == [("line", place) for place in at]
    assert "is not JSON" in found[0].reason and "is a number, not text" in found[1].reason
    with pytest.raises(DataError, match=r"a\.jsonl.*: the line at byte .* is not JSON"):
        prepare(job(tmp_path / "mixed", tmp_path / "stop", SkipPolicy()), ProgressBar())


def test_bad_files(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_MIN_TASK_BYTES", 1 << 16)
    clean, mixed = tmp_path / "a" / "in", tmp_path / "b" / "in"
    clean.mkdir(parents=True)
    (clean / "a.jsonl").write_text(GOOD)
    (clean / "z.jsonl.gz").write_bytes(gzip.compress(GOOD.encode()))
    shutil.copytree(clean, mixed)
    long = "".join(json.dumps({"text": f"{n * 7919}"}) + "\n" for n in range(200_000))
    cut = gzip.compress(long.encode())[:-1000]  # many documents come before the error
    (mixed / "b.jsonl.gz").write_bytes(cut)
    (mixed / "c.parquet").write_bytes(b"PAR1 nothing")
    (mixed / "d.parquet").touch()
    (mixed / "e.jsonl").symlink_to("nowhere")
    (mixed / "f.jsonl.gz").write_bytes(b"not gzip")
    (mixed / "g.jsonl.lz4").write_bytes(b"x")
    parquet.write_table(pa.table({"body": ["x"]}), mixed / "h.parquet")
    found = equal_without(tmp_path, mixed, clean)
    names = {item.file.rpartition("/")[2] for item in found}
    assert names == {
        "b.jsonl.gz", "c.parquet", "d.parquet", "e.jsonl", "f.jsonl.gz", "g.jsonl.lz4", "h.parquet",
    }  # fmt: skip
    assert len(found) == 7 and {(item.kind, item.position) for item in found} == {("file", None)}


def test_documents_that_are_too_long(tmp_path, monkeypatch):
    from hg_scale.data.preparation import batches, sources

    monkeypatch.setattr(batches, "MAX_DOCUMENT_BYTES", 500)
    monkeypatch.setattr(sources, "_BLOCK", 64)
    texts = [f"text {n} " * 3 for n in range(60)]
    for name, middle in (("mixed", "y" * 2000), ("blank", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "b.txt").write_text("|".join([*texts, middle]))
    made = [job(tmp_path / n, tmp_path / f"o{n}", separator=b"|") for n in ("mixed", "blank")]
    for each in made:
        prepare(each, ProgressBar())
    assert shards(tmp_path / "omixed") == shards(tmp_path / "oblank")
    position = len("|".join(texts)) + 1
    assert [item[1:3] for item in made[0].log.items] == [("document", position)]


def test_bad_images(tmp_path):
    pixels = np.random.default_rng(5).integers(0, 256, (40, 6, 5, 3), np.uint8)
    for name in ("mixed", "clean"):
        (tmp_path / name).mkdir()
        for number, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / name / f"{number:02d}.png")
    mixed = tmp_path / "mixed"
    (mixed / "00.jpg").write_bytes(b"not an image")  # the first, whose shape all would need
    (mixed / "07x.png").write_bytes((mixed / "08.png").read_bytes()[:70])
    Image.fromarray(pixels[0]).convert("RGBA").save(mixed / "09x.png")
    Image.fromarray(pixels[0, :4]).save(mixed / "30.png.webp")
    np.save(mixed / "x.npy", pixels[:3, ..., 0])
    Image.fromarray(pixels[0]).save(mixed / "zz.tga")
    corpora = {name: ImageCorpus((tmp_path / name,)) for name in ("mixed", "clean")}
    for name, corpus in corpora.items():
        made = Job(corpus, corpus.inputs, tmp_path / f"o{name}", 300, 900, policy=SKIP)
        prepare(made, ProgressBar())
    assert shards(tmp_path / "omixed") == shards(tmp_path / "oclean")
    found = read_list(tmp_path / "omixed" / "skipped.jsonl")
    assert [item.file.rpartition("/")[2] for item in found] == [
        "00.jpg", "07x.png", "09x.png", "30.png.webp", "x.npy",
    ]  # fmt: skip
    assert [item.kind for item in found] == ["image"] * 4 + ["file"]
    assert list(corpora["mixed"].remarks()) == [
        "  files: 1 .npy, 42 .png, 1 .webp",
        "  left out, as they are no images: 1 .tga",
    ]


def test_the_limit(tmp_path):
    mixed, _, at = lines_with_errors()
    (tmp_path / "a.jsonl").write_bytes(mixed)
    exact = SkipPolicy("skip", len(at))
    with pytest.raises(DataError, match=r"5 items cannot be read, more than --max-skipped 4"):
        prepare(job(tmp_path / "a.jsonl", tmp_path / "out", replace(exact, max_skipped=4)),
                ProgressBar())  # fmt: skip
    assert not (tmp_path / "out").exists()
    prepare(job(tmp_path / "a.jsonl", tmp_path / "out", exact), ProgressBar())
    again = job(tmp_path / "a.jsonl", tmp_path / "out", exact)
    assert not prepare(again, ProgressBar())[1] and len(again.log.items) == 5
    with pytest.raises(DataError, match="earlier start with --on-fault skip left out 5 lines; set"):
        prepare(job(tmp_path / "a.jsonl", tmp_path / "out", SkipPolicy()), ProgressBar())


def test_a_restart_counts_items_once_and_may_change_the_policy(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_MIN_TASK_BYTES", 1000)
    mixed, blank, at = lines_with_errors()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(mixed)
    (tmp_path / "in" / "0.jsonl").write_text(GOOD)
    stopped = job(tmp_path / "in", tmp_path / "out", SkipPolicy())
    with pytest.raises(DataError, match="Part of the work is done"):
        prepare(stopped, ProgressBar())  # finds the first bad line after a few tasks
    with pytest.raises(DataError, match="more than --max-skipped 2"):
        prepare(job(tmp_path / "in", tmp_path / "out", SkipPolicy("skip", 2)), ProgressBar())
    with pytest.raises(DataError, match="more than --max-skipped 4"):
        prepare(job(tmp_path / "in", tmp_path / "out", SkipPolicy("skip", 4)), ProgressBar())
    resumed = job(tmp_path / "in", tmp_path / "out", SkipPolicy("skip", 5))
    prepare(resumed, ProgressBar())
    assert [item.position for item in resumed.log.items] == at
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.jsonl").write_bytes(blank)
    (tmp_path / "blank" / "0.jsonl").write_text(GOOD)
    prepare(job(tmp_path / "blank", tmp_path / "clean"), ProgressBar())
    assert shards(tmp_path / "out") == shards(tmp_path / "clean")


def test_processes_leave_out_the_same(tmp_path):
    mixed, _, at = lines_with_errors()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(mixed)
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress(GOOD.encode())[:-9])
    prepare(job(tmp_path / "in", tmp_path / "one"), ProgressBar())
    command = [sys.executable, str(ROOT / "data_prep" / "prepare_text.py"), "--input",
               str(tmp_path / "in"), "--output", str(tmp_path / "two"), "--on-fault", "skip",
               "--split", "0.8,0.1,0.1", "--chunk-tokens", "512",
               "--shard-tokens", "4000"]  # fmt: skip
    ranks = [
        subprocess.Popen(
            command, env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert "left out 1 file, 5 lines: " in outputs[0][0] and outputs[0][0].count("at byte") >= 3
    assert shards(tmp_path / "one") == shards(tmp_path / "two")
    lists = [(tmp_path / name / "skipped.jsonl").read_bytes() for name in ("one", "two")]
    assert lists[0] == lists[1] and lists[0].count(b"\n") == len(at) + 1


def test_in_order(tmp_path):
    for name in ("mixed", "clean"):
        (tmp_path / name).mkdir()
        for number in range(30):
            (tmp_path / name / f"{number}.txt").write_text(f"text {number} " * 9)
    (tmp_path / "mixed" / "5x.txt.gz").write_bytes(gzip.compress(b"text" * 999)[:-5])
    (tmp_path / "mixed" / "7x.txt").symlink_to("nowhere")
    jobs = [
        Preparation(tmp_path / name, tmp_path / f"o{name}", chunk_tokens=64, policy=SKIP)
        for name in ("mixed", "clean")
    ]
    for made in jobs:
        prepare_bytes(made, ProgressBar())
    assert shards(tmp_path / "omixed") == shards(tmp_path / "oclean") != {}
    assert sorted(item.file[-9:] for item in jobs[0].log.items) == ["5x.txt.gz", "ed/7x.txt"]
    assert len(read_list(tmp_path / "omixed" / "skipped.jsonl")) == 2
    again = replace(jobs[0])
    assert not prepare_bytes(again, ProgressBar())[1] and len(again.log.items) == 2
    with pytest.raises(DataError, match="cut short"):
        prepare_bytes(
            Preparation(tmp_path / "mixed", tmp_path / "stop", exclude=("7x.txt",)), ProgressBar()
        )


def test_a_tokenizer_sample(tmp_path):
    mixed, blank, at = lines_with_errors()
    for name, content in (("mixed", mixed), ("blank", blank)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_bytes(content)
    (tmp_path / "mixed" / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "q"}\n' * 9)[:-9])
    jobs = [
        TokenizerTraining((tmp_path / name,), tmp_path / f"{name}.model", 280, policy=SKIP)
        for name in ("mixed", "blank")
    ]
    trained = [train_tokenizer(made, ProgressBar()) for made in jobs]
    assert trained[0].tokenizer.model == trained[1].tokenizer.model
    kinds = sorted(item[1:3] for item in read_list(tmp_path / "mixed.model.skipped.jsonl"))
    assert kinds == [("file", None), *(("line", place) for place in at)]
    assert not jobs[1].skipped_list.exists()


def test_the_log_is_read_back(tmp_path):
    log = SkipLog(SKIP)
    log.skip("a\udcff.txt", "file", None, "a\udcff.txt: is\nempty")
    log.skip("a\udcff.txt", "file", None, "again")
    log.remarks["turned"] += 2
    log.write(tmp_path / "log")
    other = SkipLog(SKIP)
    other.read(tmp_path / "log")
    other.read(tmp_path / "log")
    assert other.items == [SkippedItem("a\udcff.txt", "file", None, "is\nempty")]
    SkipLog(SKIP).write(tmp_path / "log")
    assert not (tmp_path / "log").exists()
    (tmp_path / "list").write_text('{"file": 3}\n')
    with pytest.raises(DataError, match="is not a list of skipped items"):
        read_list(tmp_path / "list")
