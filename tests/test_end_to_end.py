"""From raw data to scores and samples, every step by the command that a user runs."""

from __future__ import annotations

import json
import subprocess
import sys
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from hg_scale.commands.main import main
from hg_scale.data.index import read_index
from tests.runs import TINY, records, train_in
from tests.shared import ROOT
from tests.world import Worlds


def run_script(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "data_prep" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(worlds: Worlds, folder: Path, shards: Path, *sets: str) -> Path:
    (folder / "tiny.json").write_text(json.dumps({**TINY, "data": {"path": str(shards)}}))
    overrides = [word for key in sets for word in ("--set", key)]
    run = folder / "run"
    done = train_in(
        worlds, 2, folder, "--config", str(folder / "tiny.json"), "--run", str(run), *overrides
    )
    assert done.code == 0, done.output
    return run


def evaluate(folder: Path, *arguments: str) -> dict[str, Any]:
    results = folder / "results.json"
    assert main(["evaluate", *arguments, "--json", str(results)]) == 0
    return dict(json.loads(results.read_text()))


def test_text_with_a_trained_tokenizer(
    worlds: Worlds, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train a tokenizer, prepare, train, evaluate in bits per byte, export, generate."""
    documents = [f"Dokument {n}: " + "Füchse und Hasen jagen nachts. " * (n % 7) for n in range(90)]
    source = tmp_path / "documents.jsonl"
    source.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    tokenizer, shards = tmp_path / "tok.model", tmp_path / "shards"
    run_script("train_tokenizer.py", "--input", str(source), "--vocab-size", "300", "--output",
           str(tokenizer))  # fmt: skip
    run_script("prepare_text.py", "--input", str(source), "--tokenizer", str(tokenizer), "--output",
           str(shards), "--split", "0.6,0.2,0.2")  # fmt: skip
    index = read_index(shards)
    run = train(
        worlds, tmp_path, shards, f"model.vocab_size={index.vocab_size}", "training.steps=30",
        "optimizer.learning_rate=0.01", "training.validation_windows=null",
        "data.tokenizer=sentencepiece",
    )  # fmt: skip
    results = evaluate(tmp_path, str(run), "--split", "validation")
    split = index.split("validation")
    assert (results["tokens"], results["bytes"]) == (split.tokens, split.text_bytes)
    assert results["tokens"] < 0.9 * results["bytes"]
    nats = results["nats_per_token"]
    assert results["bits_per_byte"] == pytest.approx(
        nats / log(2) * split.tokens / split.text_bytes
    )
    expected = records(run)[-1]["validation_bits_per_byte"]
    assert results["bits_per_byte"] == pytest.approx(expected, rel=1e-5)

    export = tmp_path / "export"
    assert main(["convert", "export", str(run), str(export)]) == 0
    assert (export / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    text = tmp_path / "text"
    text.write_text("Füchse und Hasen jagen nachts. " * 20)
    scores = [evaluate(tmp_path, str(path), "--data", str(text)) for path in (run, export)]
    assert scores[0]["bytes"] == len(text.read_bytes())
    assert scores[0]["bits_per_byte"] == scores[1]["bits_per_byte"]
    mixed = "Füchse und Hasen jagen nachts. " * 4 + "0123456789 qxqxqx " * 40
    text.write_text(mixed)  # starts with longer tokens than the rest
    part = evaluate(tmp_path, str(run), "--data", str(text), "--windows", "2")
    tokens = index.open_tokenizer().encode(mixed)
    assert part["tokens"] == 2 * part["window"] < len(tokens)
    assert part["bytes"] == len(index.open_tokenizer().decode(tokens[: part["tokens"]]))
    capsys.readouterr()
    for path in (run, export):
        assert main(["generate", str(path), "--prompt", "Füchse", "--tokens", "20"]) == 0
    first, second = capsys.readouterr().out.split("Füchse", 2)[1:]
    assert len(first) > 10 and first == second
    # The run folder has a copy of its tokenizer.
    shards.rename(tmp_path / "away")
    assert main(["generate", str(run), "--prompt", "Füchse", "--tokens", "20"]) == 0
    assert capsys.readouterr().out == f"Füchse{first}"
    assert evaluate(tmp_path, str(run), "--data", str(text), "--windows", "2") == part
    assert main(["convert", "export", str(run), str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == tokenizer.read_bytes()


def test_images(worlds: Worlds, tmp_path: Path) -> None:
    """Prepare the digits, train, evaluate in bits per dimension, generate."""
    np.save(tmp_path / "digits.npy", (load_digits().images * 15.9).astype(np.uint8))
    shards = tmp_path / "shards"
    run_script(
        "prepare_images.py", "--input", str(tmp_path / "digits.npy"), "--output", str(shards)
    )
    run = train(
        worlds, tmp_path, shards, "model.sequence_length=64", "model.vocab_size=256",
        "training.steps=40", "training.global_batch_size=8", "optimizer.learning_rate=0.01",
    )  # fmt: skip
    results = evaluate(tmp_path, str(run), "--split", "test")
    assert results["bits_per_dimension"] == results["bits_per_token"] < 6  # uniform: 8
    assert results["tokens"] == 64 * read_index(shards).split("test").documents
    assert main(["evaluate", str(run), "--window", "32"]) == 2  # an image is scored on its own
    assert main(["evaluate", str(run), "--data", __file__]) == 2  # not text
    assert main(["generate", str(run), "--tokens", "9"]) == 2  # images have a fixed size
    picture = tmp_path / "generated.png"
    assert main(["generate", str(run), "--count", "4", "--output", str(picture)]) == 0
    with Image.open(picture) as image:
        assert image.size == (2 * 66 + 2, 2 * 66 + 2)  # enlarged 8 times, gaps of 2
    assert main(["report", str(run), "--sample", "1"]) == 0
    assert 'src="data:image/png;base64,' in (run / "report.html").read_text()
