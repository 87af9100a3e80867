"""Shuffled shards in one process; many ranks are tested in test_prepare_text.py."""

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from hg_scale.data.errors import DataError
from hg_scale.data.evaluation import split_text
from hg_scale.data.index import read_index
from hg_scale.data.preparation import shuffled as module
from hg_scale.data.preparation import spill
from hg_scale.data.preparation.documents import TextFormat
from hg_scale.data.preparation.shuffled import Job, prepare
from hg_scale.data.preparation.text_corpus import TextCorpus
from hg_scale.data.progress import ProgressBar
from hg_scale.data.shards import SplitReader
from hg_scale.data.tokenizer import ByteTokenizer, SentencePieceTokenizer
from tests.data.conftest import prose
from tests.data.preparation.test_in_order import contents
from tests.shared import shared

FRACTIONS = (0.8, 0.1, 0.1)


def make_corpus(folder, documents=300):
    """Write JSON lines and plain files. Returns the documents that are not empty."""
    folder.mkdir()
    texts = [prose(number % 97, seed=number) for number in range(documents)]
    third = documents // 3
    for name, part in [("a.jsonl", texts[:third]), ("b.jsonl", texts[third : 2 * third])]:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (folder / name).write_text(lines)
    for number, text in enumerate(texts[2 * third :]):
        (folder / f"{number:03d}.txt").write_text(text)
    return [text.encode() for text in texts if text]


def run(source, output, tokenizer, **options):
    """Prepare a folder with small shards."""
    job = {"chunk_tokens": 512, "shard_tokens": 3000}
    job |= {key: options.pop(key) for key in ("chunk_tokens", "shard_tokens") if key in options}
    corpus = TextCorpus((source,), tokenizer, **{"fractions": FRACTIONS} | options)
    return prepare(Job(corpus, (source,), output, **job), ProgressBar())


def documents_of(index, name, tokenizer):
    """Return the documents of a split, in order."""
    tokens = SplitReader(index, name).read(0, index.splits[name].tokens)
    ends = np.flatnonzero(tokens == tokenizer.eod) + 1
    assert ends[-1] == len(tokens)
    return [tokenizer.decode(part) for part in np.split(tokens, ends)[:-1]]


@pytest.fixture(params=["bytes", "sentencepiece"])
def tokenizer(request, model_file):
    if request.param == "bytes":
        return ByteTokenizer(documents=True)
    return SentencePieceTokenizer.read(model_file, documents=True)


def test_every_document_once_and_shuffled(tmp_path, tokenizer):
    texts = make_corpus(tmp_path / "in")
    index, written = run(tmp_path / "in", tmp_path / "out", tokenizer)
    assert written and index == read_index(tmp_path / "out")
    found = []
    for name, split in index.splits.items():
        documents = documents_of(index, name, tokenizer)
        assert split.documents == len(documents)
        assert split.text_bytes == sum(map(len, documents))
        begin = 0
        for shard in split.shards:
            ends = shard.document_ends()
            assert ends[-1] == shard.tokens  # no document continues in the next shard
            assert shard.text_bytes == sum(map(len, documents[begin : begin + len(ends)]))
            begin += len(ends)
        assert len(split.shards) > 1
        found += documents
    assert sorted(found) == sorted(texts)
    train = documents_of(index, "train", tokenizer)
    order = np.array([texts.index(text) for text in train])
    assert abs(np.abs(order - np.arange(len(order))).mean() / len(texts) - 1 / 3) < 0.06
    assert 0.7 < len(train) / len(texts) < 0.9
    sizes = [shard.text_bytes for shard in index.splits["train"].shards]
    assert max(sizes) < 2 * min(sizes)
    assert index.open_tokenizer().identity == tokenizer.identity
    assert not (tmp_path / "out" / "preparing").exists()


def test_another_seed_gives_another_order_of_the_same_documents(tmp_path):
    texts = make_corpus(tmp_path / "in", 60)
    tokenizer = ByteTokenizer(documents=True)
    orders = []
    for seed in (0, 1):
        index, _ = run(tmp_path / "in", tmp_path / f"{seed}", tokenizer, seed=seed,
                       fractions=(1.0, 0.0, 0.0))  # fmt: skip
        orders.append(documents_of(index, "train", tokenizer))
        assert not index.splits["test"].shards
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == sorted(texts)


def test_shards_do_not_depend_on_the_memory(tmp_path, monkeypatch):
    make_corpus(tmp_path / "in")
    tokenizer = ByteTokenizer(documents=True)
    run(tmp_path / "in", tmp_path / "one", tokenizer)
    monkeypatch.setattr(spill, "RUN_BYTES", 5000)
    run(tmp_path / "in", tmp_path / "two", tokenizer)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_equal_documents_are_in_the_same_split(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        lines = [json.dumps({"text": f"document {number}"}) + "\n" for number in range(200)]
        (tmp_path / "in" / name).write_text("".join(lines))
    tokenizer = ByteTokenizer(documents=True)
    index, _ = run(tmp_path / "in", tmp_path / "out", tokenizer, fractions=(0.4, 0.3, 0.3))
    splits = [documents_of(index, name, tokenizer) for name in index.splits]
    assert sum(map(len, splits)) == 400
    assert sum(len(set(documents)) for documents in splits) == 200


def test_splits_by_folder(tmp_path):
    for name in ("train/a.txt", "train/b.txt", "val/a.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    tokenizer = ByteTokenizer(documents=True)
    index, _ = run(tmp_path / "in", tmp_path / "out", tokenizer, fractions=None)
    assert documents_of(index, "validation", tokenizer) == [b"val/a.txt"]
    assert sorted(documents_of(index, "train", tokenizer)) == [b"train/a.txt", b"train/b.txt"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_one_text_is_split_by_position(tmp_path, model_file, suffix):
    import gzip

    text = prose(90_000).encode()[:400_001] + b"\xff\xe2\x96\x81"
    path = tmp_path / f"text{suffix}"
    path.write_bytes(gzip.compress(text) if suffix else text)
    sizes = (300_005, 70_000, 30_000)
    for tokenizer in (
        ByteTokenizer(documents=False),
        SentencePieceTokenizer.read(model_file, documents=False),
    ):
        output = tmp_path / tokenizer.identity.name
        index, _ = run(path, output, tokenizer, fractions=None, sizes=sizes, shard_tokens=20_000)
        assert index.eod is None and index.splits["train"].documents is None
        assert [split.text_bytes for split in index.splits.values()] == list(sizes)
        assert b"".join(split_text(index, name) for name in index.splits) == text
        assert len(index.splits["train"].shards) > 3
    with pytest.raises(DataError, match="has 400005 bytes of text, --split adds up to 400006"):
        run(path, tmp_path / "no", tokenizer, fractions=None, sizes=(400_000, 6, 0))


def test_text_bytes_are_those_of_the_source_with_a_lossy_tokenizer(tmp_path):
    model = SentencePieceTokenizer.read(shared("data/spm/google_test_model.model"), documents=True)
    texts = make_corpus(tmp_path / "in", 60)
    index, _ = run(tmp_path / "in", tmp_path / "out", model)
    assert sum(s.text_bytes for s in index.splits.values()) == sum(map(len, texts))
    assert sum(len(split_text(index, name)) for name in index.splits) != sum(map(len, texts))
    assert not index.open_tokenizer().round_trips


@pytest.mark.parametrize("name", ["google_test_model", "ours", "space in front"])
def test_one_text_has_the_tokens_of_the_whole(tmp_path, model_file, name):
    """Of each split as a text, though its pieces and shards are encoded one by one."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    path = shared(f"data/spm/{name}.model") if "google" in name else model_file
    if name == "space in front":
        proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
        proto.normalizer_spec.add_dummy_prefix = True
        path = tmp_path / "model"
        path.write_bytes(proto.SerializeToString())
    tokenizer = SentencePieceTokenizer.read(path, documents=False)
    text = prose(90_000).encode()[:400_000].decode(errors="ignore").encode().ljust(400_000)
    cut = text.index(b" ", 300_000)
    (tmp_path / "text").write_bytes(text)
    index, _ = run(tmp_path / "text", tmp_path / "out", tokenizer, fractions=None,
                   sizes=(cut, 400_000 - cut, 0), shard_tokens=20_000)  # fmt: skip
    assert len(index.splits["train"].shards) > 3
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for split, part in (("train", text[:cut]), ("validation", text[cut:])):
        found = SplitReader(index, split).read(0, index.splits[split].tokens)
        expected = np.array(processor.encode(part.decode()))
        if "google" not in name:
            assert np.array_equal(found, expected)
        else:  # unigram, whose rounding decides between nearly equal segmentations
            assert abs(len(found) - len(expected)) < 5


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return a source, and what an uninterrupted run prepares from it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    make_corpus(folder / "in", 90)
    run(folder / "in", folder / "out", ByteTokenizer(documents=True))
    return folder / "in", contents(folder / "out")


@pytest.mark.parametrize("moment", [*range(0, 30, 3), 40, 60])
def test_killed_at_any_file_and_restarted(tmp_path, monkeypatch, uninterrupted, moment):
    """The restarted run writes the same bytes and does no work twice."""
    source, expected = uninterrupted
    tokenizer = ByteTokenizer(documents=True)
    original, committed = os.replace, []

    def failing(partial, path):
        if len(committed) == moment:
            raise Killed
        original(partial, path)
        committed.append(Path(path).name)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with contextlib.suppress(Killed):
            run(source, tmp_path / "out", tokenizer)
    for path in (tmp_path / "out").glob("*.tar"):
        assert path.read_bytes() == expected[path.name]
    done = {name for name in committed if name.endswith((".table", ".tar.json"))}
    moment = 10**9
    with monkeypatch.context() as patch:
        committed.clear()
        patch.setattr(os, "replace", failing)
        run(source, tmp_path / "out", tokenizer)
    assert not done & set(committed)
    assert contents(tmp_path / "out") == expected


def test_each_shard_is_synced_once_and_no_task(tmp_path, monkeypatch):
    """Beside them only the few files of the preparation, each with its folder."""
    make_corpus(tmp_path / "in", 90)
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}"))
    )
    tokenizer = ByteTokenizer(documents=True)
    index, _ = run(tmp_path / "in", tmp_path / "out", tokenizer)
    shards = [shard.file for split in index.splits.values() for shard in split.shards]
    files = [Path(name).name.split(".partial")[0] for name in synced]
    for shard in shards:
        assert sum(name.startswith(f"{shard}.") for name in files) == 1
    assert len(shards) >= 10 and len(files) - len(shards) < 12
    # The last ones: the names of the shards, then the index and its name.
    assert [name.split(".")[0] for name in files[-3:]] == ["out", "index", "out"]


@pytest.mark.parametrize("what", ["text", "table", "record"])
def test_work_that_a_crash_of_the_machine_lost_is_done_again(
    tmp_path, monkeypatch, uninterrupted, what
):
    source, expected = uninterrupted
    tokenizer = ByteTokenizer(documents=True)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with contextlib.suppress(KeyboardInterrupt):
            run(source, tmp_path / "out", tokenizer)
    work = tmp_path / "out" / "preparing"
    lost = (
        next((work / "shards").iterdir()) if what == "record" else work / "text" / f"00000.{what}"
    )
    lost.write_bytes(bytes(lost.stat().st_size))
    (tmp_path / "out" / "train-00001.tar").unlink()
    run(source, tmp_path / "out", tokenizer)
    assert contents(tmp_path / "out") == expected


def test_finished_output_is_used_again_or_refused(tmp_path):
    make_corpus(tmp_path / "in", 30)
    tokenizer, out = ByteTokenizer(documents=True), tmp_path / "out"
    index, _ = run(tmp_path / "in", out, tokenizer)
    assert run(tmp_path / "in", out, tokenizer) == (index, False)
    with pytest.raises(DataError, match="from 'in' with another seed, shard_tokens; choose"):
        run(tmp_path / "in", out, tokenizer, seed=5, shard_tokens=1000)
    text = (tmp_path / "in" / "001.txt").read_text()
    (tmp_path / "in" / "001.txt").write_text(text[::-1])  # as long as before
    with pytest.raises(DataError, match="from 'in' with another times of the files; choose"):
        run(tmp_path / "in", out, tokenizer)
    (tmp_path / "in" / "000.txt").write_text("longer " * 99)
    with pytest.raises(DataError, match="with another bytes, names and sizes"):
        run(tmp_path / "in", out, tokenizer)


def test_a_changed_source_is_not_resumed(tmp_path, monkeypatch):
    make_corpus(tmp_path / "in", 30)
    tokenizer, out = ByteTokenizer(documents=True), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(DataError, match="stop here"):
        patch.setattr(module, "_plan", lambda *_: (_ for _ in ()).throw(DataError("stop here")))
        run(tmp_path / "in", out, tokenizer)
    text = (tmp_path / "in" / "001.txt").read_text()
    (tmp_path / "in" / "001.txt").write_text(text[::-1])
    with pytest.raises(DataError, match="another times of the files; use the same input"):
        run(tmp_path / "in", out, tokenizer)


def test_an_error_before_any_work_leaves_nothing_behind(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jsonl").write_text('{"text": "one"}\nnot JSON\n')
    make_corpus(tmp_path / "in", 30)
    tokenizer, out = ByteTokenizer(documents=True), tmp_path / "out"
    with pytest.raises(DataError, match="fix or remove it$"):
        run(tmp_path / "bad", out, tokenizer)
    assert not out.exists()
    assert run(tmp_path / "in", out, tokenizer)[1]


def test_an_unfinished_job_without_finished_work_is_replaced(tmp_path):
    """Several ranks leave such files where one fails before any task is done."""
    make_corpus(tmp_path / "in", 30)
    tokenizer, out = ByteTokenizer(documents=True), tmp_path / "out"
    (out / "preparing" / "text").mkdir(parents=True)
    (out / "preparing" / "text" / "00000.text").touch()
    (out / "preparing" / "text" / "00000.table").touch()
    (out / "preparing" / "job.json").write_text('{"name": "other", "goes_on": true}')
    run(tmp_path / "in", out, tokenizer)
    run(tmp_path / "in", tmp_path / "again", tokenizer)
    assert contents(out) == contents(tmp_path / "again")


def test_an_error_after_some_work_tells_how_to_start_over(tmp_path, monkeypatch):
    from hg_scale.data.preparation import corpus

    monkeypatch.setattr(corpus, "_MIN_TASK_BYTES", 1)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "one"}\n' * 99)
    (tmp_path / "in" / "b.jsonl").write_text("not JSON\n")
    tokenizer, out = ByteTokenizer(documents=True), tmp_path / "out"
    with pytest.raises(
        DataError, match="fix or remove it. Part of the work is done in .*out: remove"
    ):
        run(tmp_path / "in", out, tokenizer)


@pytest.mark.parametrize("name", ["notes.txt", "train-00000.tar"])
def test_foreign_files_are_never_touched(tmp_path, name):
    make_corpus(tmp_path / "in", 30)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"mine")
    with pytest.raises(DataError, match=f"not empty \\(it contains '{name}'\\)"):
        run(tmp_path / "in", tmp_path / "out", ByteTokenizer(documents=True))
    assert contents(tmp_path / "out") == {name: b"mine"}


def test_unsuitable_inputs_are_refused(tmp_path):
    tokenizer = ByteTokenizer(documents=True)
    (tmp_path / "text").write_text("one")
    (tmp_path / "empty.jsonl").write_text("\n")
    cases = [
        (tmp_path / "text", {}, "a plain text file is one document.*--document-separator"),
        (tmp_path / "empty.jsonl", {}, "contains no documents"),
        (
            tmp_path / "empty.jsonl",
            {"fractions": None, "sizes": (1, 1, 1)},
            "is for a single plain",
        ),
        (tmp_path / "absent", {}, "absent: no such file or folder"),
    ]
    for source, options, message in cases:
        with pytest.raises(DataError, match=message):
            run(source, tmp_path / f"out-{source.name}", tokenizer, **options)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.txt.gz", "a.parquet"])
def test_empty_files_of_formats_that_never_are_empty_are_refused(tmp_path, name):
    """An unfinished copy is not taken for a file without documents."""
    make_corpus(tmp_path / "in", 30)
    (tmp_path / "in" / name).touch()
    with pytest.raises(DataError, match=f"{name}: is empty, .*download it again"):
        run(tmp_path / "in", tmp_path / "out", ByteTokenizer(documents=True))
    (tmp_path / "in" / name).unlink()
    (tmp_path / "in" / "empty.jsonl").touch()
    assert run(tmp_path / "in", tmp_path / "out", ByteTokenizer(documents=True))[1]


def test_a_document_longer_than_a_shard_is_not_split(tmp_path, tokenizer):
    texts = make_corpus(tmp_path / "in", 90)
    (tmp_path / "in" / "long.txt").write_text(prose(12_000, seed=99))
    texts.append((tmp_path / "in" / "long.txt").read_bytes())
    index, _ = run(tmp_path / "in", tmp_path / "out", tokenizer, fractions=(1.0, 0.0, 0.0))
    assert sorted(documents_of(index, "train", tokenizer)) == sorted(texts)
    sizes = sorted(shard.text_bytes for shard in index.splits["train"].shards)
    assert sizes[-1] >= len(texts[-1]) > 4 * sizes[-2]


def test_documents_between_separators(tmp_path):
    (tmp_path / "text").write_text("one<end>two<end><end>three\n<end>")
    tokenizer = ByteTokenizer(documents=True)
    index, _ = run(tmp_path / "text", tmp_path / "out", tokenizer, fractions=(1.0, 0.0, 0.0),
                   format=TextFormat(separator=b"<end>"))  # fmt: skip
    assert sorted(documents_of(index, "train", tokenizer)) == [b"one", b"three\n", b"two"]
    assert index.source["separator"] == "<end>"


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 50])
def test_shard_ranges_have_equal_size_and_are_not_empty(parts):
    random = np.random.default_rng(parts)
    size = random.integers(0, 100, 4096) * (random.random(4096) < 0.2)
    spans = module._cut(size, parts)
    assert [low for low, _ in spans[1:]] == [high for _, high in spans[:-1]]
    assert (spans[0][0], spans[-1][1]) == (0, 4096) and len(spans) == parts
    sizes = [size[low:high].sum() for low, high in spans]
    assert max(sizes) - min(sizes) <= 200
    few = np.zeros(4096, np.int64)
    few[[5, 4000]] = [3, 1]
    spans = module._cut(few, parts)
    assert all(few[low:high].sum() for low, high in spans) and len(spans) <= 2
