import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from hg_scale.data.errors import DataError
from hg_scale.data.preparation import batches, sources
from hg_scale.data.preparation import documents as module
from hg_scale.data.preparation.compression import compression_of
from hg_scale.data.preparation.documents import TextFormat, read_pieces

PACKERS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


def read(path: Path, form: TextFormat = TextFormat(), begin: int = 0, end: int | None = None):  # noqa: B008
    end = path.stat().st_size if end is None else end
    return list(form.documents(path, begin, end, path.parent, lambda count: None))


@pytest.mark.parametrize("suffix", PACKERS)
def test_every_format_gives_the_same_documents(tmp_path, suffix):
    texts = ["one", "two\nlines\t", "", "vier é 漢 ▁", "5" * 3000]
    lines = "".join(json.dumps({"n": 1, "body": text}) + "\n" for text in texts)
    parquet.write_table(
        pyarrow.table({"n": range(5), "body": texts}), tmp_path / "plain.parquet", row_group_size=2
    )
    contents = {
        "a.jsonl": lines.encode(),
        "a.txt": "<end>".join(texts).encode(),
        "a.parquet": (tmp_path / "plain.parquet").read_bytes(),
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(PACKERS[suffix](content))
        found = read(path, TextFormat("body", b"<end>"))
        assert [text.decode() for _, text in found] == texts, name
        assert len({position for position, _ in found}) == 5
    assert [text for _, text in read(tmp_path / f"a.txt{suffix}")] == [contents["a.txt"]]


@settings(deadline=None)
@given(
    parts=st.lists(st.binary(max_size=9).map(lambda b: b.replace(b"\n", b"x")), max_size=30),
    step=st.integers(1, 40),
    block=st.integers(1, 20),
)
@pytest.mark.parametrize("separator", [b"\n", b"ab", b"<end>"])
def test_parts_of_a_file_contain_each_document_once(
    tmp_path_factory, separator, parts, step, block
):
    """The documents and their positions do not depend on the segments or on the block size."""
    path = tmp_path_factory.mktemp("text") / "text"
    content = separator.join(part.replace(separator, b"") for part in parts)
    assume(compression_of(content) is None)  # drawn from the constants in the code, too
    path.write_bytes(content)
    form = TextFormat(separator=separator)
    assert form.can_split(path)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_BLOCK", block)
        for begin in range(0, len(content), step):
            found += read(path, form, begin, min(begin + step, len(content)))
    position, expected = 0, []
    for part in content.split(separator):
        expected.append((position, part))
        position += len(part) + len(separator)
    while expected and not expected[-1][1]:
        expected.pop()
    assert [entry for entry in found if entry[1]] == [entry for entry in expected if entry[1]]


def test_files_that_cannot_be_split(tmp_path):
    plain, packed, lines = tmp_path / "a.txt", tmp_path / "a.txt.gz", tmp_path / "a.jsonl"
    plain.write_bytes(b"a text")
    packed.write_bytes(gzip.compress(b"a text"))
    lines.write_bytes(b"{}")
    assert not TextFormat().can_split(plain)
    assert not TextFormat(separator=b"\n\n").can_split(plain)
    assert not TextFormat(separator=b"abcab").can_split(plain)
    assert not TextFormat(separator=b"\n").can_split(packed)
    assert TextFormat().can_split(lines)


def test_compression_is_recognised_whatever_the_name(tmp_path):
    """gzip under a name of its own is read, and what is named .gz must be gzip."""
    path = tmp_path / "dictionary.dz"
    path.write_bytes(gzip.compress(b"one") + gzip.compress(b" text"))
    assert read(path) == [(0, b"one text")]
    assert not TextFormat(separator=b"\n").can_split(path)
    for name, content in (("a.gz", b"plain"), ("a.xz", gzip.compress(b"x")), ("a.zst", b"{}")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: cannot be decompressed \\(it contains "):
            read(tmp_path / name)


@pytest.mark.parametrize("step", [100, 1500, 10_000])
def test_row_groups_are_read_once(tmp_path, step):
    path = tmp_path / "a.parquet"
    texts = [f"document {number} " * 9 for number in range(100)]
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=13)
    size, found = path.stat().st_size, []
    for begin in range(0, size, step):
        found += read(path, begin=begin, end=min(begin + step, size))
    assert [(row, text.decode()) for row, text in found] == list(enumerate(texts))


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_text_columns_of_every_type(tmp_path, kind):
    values = pyarrow.array(["a", None, "c"])
    if kind == "dictionary":
        values = values.dictionary_encode()
    elif kind != "string":
        values = values.cast(kind)
    parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [(0, b"a"), (2, b"c")]


def test_empty_lines_and_null_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n  \r\n{"text": null}\n{"text": "\\ud800b"}')
    assert [text for _, text in read(path)] == [b"a", b"\xed\xa0\x80b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', r"a\.jsonl: the line at byte 14 is not JSON"),
        ('{"body": "a", "n": 1}', r"has no field 'text' \(it has: body, n\).*--field"),
        ("[1]", "the line at byte 0 is an array; expected an object per line"),
        ('"text"', "the line at byte 0 is a string; expected an object per line"),
        ("[" * 100_000, "the line at byte 0 is not JSON .*recursion"),
        ("\x1f\x8b\0\x9e\n", "the line at byte 0 is not JSON"),
        ('{"text": 5}', "field 'text' of the line at byte 0 is a number, not text"),
    ],
)
def test_invalid_lines_are_reported(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "a.jsonl")
    assert "\n" not in str(caught.value)


def test_unusable_parquet_is_reported(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"n": [1, 2], "url": ["a", "b"]}), path)
    with pytest.raises(DataError, match=r"has no column 'text' \(it has: n, url\).*--field"):
        read(path)
    with pytest.raises(DataError, match="column 'n' holds int64, not text"):
        read(path, TextFormat("n"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be read as Parquet") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_documents_that_are_too_long_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "MAX_DOCUMENT_BYTES", 1 << 20)
    (tmp_path / "a").write_bytes(b"x" * (3 << 20))
    for form in (TextFormat(), TextFormat(separator=b"#")):
        with pytest.raises(DataError, match="byte 0 is longer than 1 MiB.*--document-separator"):
            read(tmp_path / "a", form)


@pytest.mark.parametrize("step", [1 << 16, 3 << 16, 1 << 20])
def test_pieces_end_at_multiples_and_cuts(tmp_path, step):
    content = bytes(range(256)) * 3000
    (tmp_path / "a").write_bytes(content)
    cuts, found = [70_000, 70_001, 700_000], []
    for begin in range(0, len(content), step):
        found += read_pieces(
            tmp_path / "a", begin, min(begin + step, len(content)), cuts, lambda count: None
        )
    assert b"".join(text for _, text in found) == content
    starts = [position for position, _ in found]
    assert starts == sorted({*range(0, len(content), 1 << 16), *cuts})


@settings(deadline=None, max_examples=60)
@given(
    content=st.text("ab \n漢", max_size=300).map(str.encode),
    tasks=st.integers(1, 5),
    bounds=st.lists(st.integers(0, 300), max_size=3),
)
def test_pieces_end_where_text_may_be_cut(tmp_path_factory, content, tasks, bounds):
    """The same ones for every number of tasks; here cuts are in front of spaces."""
    assume(compression_of(content) is None)
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_bytes(content)

    def last_space(data, low, high):
        cut = data.rfind(b" ", low + 1, high + 1)
        return None if cut < 0 else cut

    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_BYTES", 16)
        patch.setattr(module, "_CUT_RANGE", 5)
        patch.setattr(sources, "_BLOCK", 7)
        for step in (16 * tasks, 400):
            found = []
            for begin in range(0, len(content), step):
                end = min(begin + step, len(content))
                found += read_pieces(path, begin, end, bounds, lambda count: None, last_space)
            runs.append(found)
    assert runs[0] == runs[1]
    assert b"".join(text for _, text in runs[0]) == content
    starts = {position for position, _ in runs[0]}
    assert starts - {0, *bounds} == {
        cut
        for mark in range(16, len(content), 16)
        if mark not in bounds
        for cut in [content.rfind(b" ", max([mark - 4, *(b + 1 for b in bounds if b < mark)]),
                                  mark + 1)]
        if cut >= 0
    } - {0, *bounds}  # fmt: skip
