"""Columns of text in Parquet, Arrow, CSV and TSV."""

import bz2
import gzip
import json

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.documents import TextFormat
from hg_scale.data.preparation.skipping import SkipLog, SkipPolicy
from hg_scale.data.preparation.tabular import NULLS


def read(path, field="text"):
    """Return the documents and the number of nulls."""
    log = SkipLog(SkipPolicy())
    found = TextFormat(field).documents(
        path, 0, path.stat().st_size, path.parent, lambda count: None, log
    )
    return list(found), log.remarks[NULLS]


def write(path, table, kind):
    if kind == "parquet":
        parquet.write_table(table, path)
        return
    new = ipc.new_stream if kind == "stream" else ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


VALUES = ["a", None, "c is long enough for a buffer of its own"]
ARRAYS = {
    "string": pyarrow.array(VALUES),
    "large_string": pyarrow.array(VALUES, pyarrow.large_string()),
    "string_view": pyarrow.array(VALUES, pyarrow.string_view()),
    "binary": pyarrow.array(VALUES).cast("binary"),
    "large_binary": pyarrow.array(VALUES).cast("large_binary"),
    "binary_view": pyarrow.array([v and v.encode() for v in VALUES], pyarrow.binary_view()),
    "dictionary": pyarrow.array(VALUES).dictionary_encode(),
    "large dictionary": pyarrow.array(VALUES, pyarrow.large_string()).dictionary_encode(),
}


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
@pytest.mark.parametrize("name", ARRAYS)
def test_text_in_every_layout(tmp_path, name, kind):
    write(tmp_path / "a", pyarrow.table({"n": range(3), "text": ARRAYS[name]}), kind)
    expected = [(0, b"a"), (2, VALUES[2].encode())]
    assert read(tmp_path / "a") == (expected, 1)
    (tmp_path / "b.gz").write_bytes(gzip.compress((tmp_path / "a").read_bytes()))
    assert read(tmp_path / "b.gz") == (expected, 1)


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_columns_of_nulls_and_run_ends(tmp_path, kind):
    write(tmp_path / "a", pyarrow.table({"text": pyarrow.nulls(5)}), kind)
    assert read(tmp_path / "a") == ([], 5)
    if kind != "parquet":  # which has no run-end encoded type
        column = pyarrow.RunEndEncodedArray.from_arrays([2, 3], ["x", "y"])
        with (ipc.new_stream if kind == "stream" else ipc.new_file)(
            str(tmp_path / "a"), pyarrow.schema({"text": column.type})
        ) as writer:
            writer.write_batch(pyarrow.record_batch({"text": column}))
        assert read(tmp_path / "a")[0] == [(0, b"x"), (1, b"x"), (2, b"y")]


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_other_types_are_refused_with_file_column_and_type(tmp_path, kind):
    write(tmp_path / "a", pyarrow.table({"n": [1], "list": [["a"]]}), kind)
    with pytest.raises(DataError, match=r"a: the column 'n' holds int64, not text"):
        read(tmp_path / "a", "n")
    with pytest.raises(DataError, match=r"a: the column 'list' holds list<"):
        read(tmp_path / "a", "list")
    with pytest.raises(DataError, match=r"a: has no column 'text' \(it has: n, list\)"):
        read(tmp_path / "a")


RECORDS = [
    {"a": {"b": {"c": "deep"}, "b.c": "literal"}, "x": "top"},
    {"a": {"b": {"c": None}, "b.c": "second"}, "x": "top"},
    {"a": {"b": None, "b.c": None}, "x": None},
    {"a": None, "x": "top"},
]


@pytest.mark.parametrize("kind", ["lines", "parquet", "stream"])
@pytest.mark.parametrize(
    ("field", "texts", "nulls"),
    [("a.b.c", [b"literal", b"second"], 2), ("x", [b"top"] * 3, 1), ("d.e.c", [b"deep"], 3)],
)
def test_nested_fields_are_the_same_in_lines_and_tables(tmp_path, kind, field, texts, nulls):
    records = [{**record, "d": record["a"] and {"e": record["a"]["b"]}} for record in RECORDS]
    path = tmp_path / "a.jsonl"
    if kind == "lines":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        write(path, pyarrow.Table.from_pylist(records), kind)
    found, count = read(path, field)
    assert ([text for _, text in found], count) == (texts, nulls)
    for absent in ("a.z", "x.b", "a..b", "."):
        with pytest.raises(DataError, match="has no (field|column) '"):
            read(path, absent)


def test_a_literal_dot_wins_at_the_top(tmp_path):
    table = pyarrow.table({"a": [{"b": "nested"}], "a.b": ["literal"]})
    for kind in ("parquet", "file"):
        write(tmp_path / "t", table, kind)
        assert read(tmp_path / "t", "a.b")[0] == [(0, b"literal")]
    (tmp_path / "t.jsonl").write_text('{"a": {"b": "nested"}, "a.b": "literal"}')
    assert read(tmp_path / "t.jsonl", "a.b")[0] == [(0, b"literal")]


def test_corrupt_arrow_is_reported(tmp_path):
    path = tmp_path / "a.arrow"
    for kind in ("file", "stream"):
        write(path, pyarrow.table({"text": ["some text"] * 99}), kind)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match=r"a\.arrow: cannot be read as Arrow \(") as caught:
            read(path)
        assert "\n" not in str(caught.value)


FIELDS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=9)


@given(st.lists(FIELDS, max_size=8), st.sampled_from([("csv", ","), ("tsv", "\t")]))
def test_csv_round_trips(tmp_path_factory, texts, kind):
    name, delimiter = kind
    path = tmp_path_factory.mktemp("csv") / f"a.{name}"
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    rows = [f"id{delimiter}text", *(f"1{delimiter}{text}" for text in quoted)]
    path.write_text("\ufeff" + "\r\n".join(rows), newline="")
    assert [text.decode() for _, text in read(path)[0]] == texts


def test_csv_keeps_bytes_and_takes_long_fields(tmp_path):
    long = b"x" * (3 << 20)  # longer than a block
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,n\ncaf\xe9,1\n"two\nlines",2\n\n"' + long + b'",3')
    assert read(path)[0] == [(0, b"caf\xe9"), (1, b"two\nlines"), (2, long)]
    (tmp_path / "b.csv.bz2").write_bytes(bz2.compress(path.read_bytes()))
    assert read(tmp_path / "b.csv.bz2")[0] == read(path)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,n\na,1\nb\n", "the row that ends in line 3 has 1 fields, the header 2"),
        ('text,n\n"a,1\n', "line 2 cannot be read as CSV .unexpected end of data"),
        ('text,n\n"a" b,1\n', "line 2 cannot be read as CSV"),
        ("a;text\n1;b\n", r"has no column 'text' \(it has: a;text\)"),
        ("text,text\n1,2\n", "has several columns 'text'"),
    ],
)
def test_invalid_csv_is_reported(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=rf"a\.csv: {message}") as caught:
        read(tmp_path / "a.csv")
    assert "\n" not in str(caught.value)


def test_rows_of_another_length_can_be_left_out(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,n\n"a\nb",1\nc\n\nd,2\n')
    log = SkipLog(SkipPolicy("skip"))
    found = list(TextFormat().documents(path, 0, 99, tmp_path, lambda count: None, log))
    assert found == [(0, b"a\nb"), (2, b"d")]
    (item,) = log.items
    assert (item.kind, item.position, path.read_bytes()[item.position :][:1]) == ("line", 15, b"c")


def test_an_empty_csv_has_no_documents(tmp_path):
    for content in ("", "text\n", "\ufefftext"):
        (tmp_path / "a.csv").write_text(content)
        assert read(tmp_path / "a.csv") == ([], 0)
