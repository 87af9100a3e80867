"""`hg-scale summary`: the model and the compressors are compared on the same text."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hg_scale.commands.main import main
from hg_scale.data.evaluation import split_text
from hg_scale.data.index import read_index
from hg_scale.errors import UserError
from hg_scale.evaluation.summary import comparison
from tests.runs import TINY


def write_finished_run(folder: Path, record: dict[str, Any], **data: Any) -> Path:
    """A run folder with the files that the table is made from."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**TINY, "data": data}))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 6} | record) + "\n")
    return folder


def rows(run: Path) -> list[list[str]]:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison(run, with_compressors=True))
    lines = console.export_text().splitlines()
    return [[cell.strip() for cell in line.split("│")[1:3]] for line in lines if "│" in line]


@pytest.mark.parametrize("tokens", [None, 320])
def test_compressors_get_the_validated_text(
    tmp_path: Path, corpus: Path, tokens: int | None
) -> None:
    index = read_index(corpus)
    tokens = tokens or index.split("validation").tokens
    record = {"validation_bits_per_byte": 2.5, "validation_loss": 1.7, "validation_tokens": tokens}
    found = dict(rows(write_finished_run(tmp_path / "run", record, path=str(corpus))))
    text = split_text(index, "validation", tokens)
    assert found["hourglass 1@1 1@2 1@1, step 6"] == "2.500"
    assert found["gzip -9"] == f"{8 * len(gzip.compress(text, 9)) / len(text):.3f}"


def test_mean_over_sources_is_not_compared(tmp_path: Path, corpus: Path) -> None:
    record = {"validation_bits_per_byte": 2.5, "validation_loss": 1.7, "validation_tokens": 320}
    sources = [{"path": str(corpus)}, {"path": str(corpus), "name": "again"}]
    assert len(rows(write_finished_run(tmp_path / "run", record, sources=sources))) == 1


def test_run_without_a_finite_validation_is_an_error(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(UserError, match="holds no validation"):
        comparison(write_finished_run(tmp_path / "run", {}, path=str(corpus)), False)
    record = {"validation_loss": None, "validation_bits_per_byte": None}
    with pytest.raises(UserError, match="no validation whose loss was finite"):
        comparison(write_finished_run(tmp_path / "lost", record, path=str(corpus)), False)


def test_truncated_last_record_is_ignored(tmp_path: Path, corpus: Path) -> None:
    record = {"validation_bits_per_byte": 2.5, "validation_loss": 1.7, "validation_tokens": 320}
    run = write_finished_run(tmp_path / "run", record, path=str(corpus))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "los')
    assert dict(rows(run))["hourglass 1@1 1@2 1@1, step 6"] == "2.500"


def test_missing_corpus_leaves_out_the_compressors(tmp_path: Path) -> None:
    record = {"validation_bits_per_byte": 2.5, "validation_loss": 1.7, "validation_tokens": 320}
    run = write_finished_run(tmp_path / "run", record, path=str(tmp_path / "gone"))
    assert len(rows(run)) == 1
    assert "no compressors: gone: " in str(comparison(run, True).caption)


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (("config.json", "model.safetensors"), (), "is an export, not a run folder"),
        ((), (), "it has no config.json"),
        (("config.json",), ("--sample", "-4"), "--sample: expected 0 or more"),
    ],
)
def test_unusable_folder_or_option_is_reported_in_one_line(
    tmp_path: Path,
    files: tuple[str, ...],
    options: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    assert main(["summary", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
