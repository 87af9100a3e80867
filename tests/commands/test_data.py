"""`hg-scale data VERB` on the command line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from hg_scale.commands.main import main
from hg_scale.data.index import read_index
from tests.data.servers import serve
from tests.shared import ROOT, shared


def prepare(script: str, *options: object) -> None:
    command = [sys.executable, str(ROOT / "data_prep" / script), *map(str, options)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    lines = [f'{{"text": "Document {n}. ' + f"It says {n} [bold]again[/bold]. " * 9 + '"}\n'
             for n in range(300)]  # fmt: skip
    (folder / "a.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def prepared(source: Path) -> Path:
    output = source.with_name("prepared")
    prepare("prepare_text.py", "--input", source, "--output", output, "--shard-tokens", 9000,
            "--chunk-tokens", 1000)  # fmt: skip
    return output


@pytest.fixture
def shards(prepared: Path, tmp_path: Path) -> Path:
    """A copy that the test may corrupt."""
    return Path(shutil.copytree(prepared, tmp_path / "shards"))


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def test_inspect_prints_the_contents(shards, capsys):
    assert main(["data", "inspect", str(shards)]) == 0
    out = capsys.readouterr().out
    index = read_index(shards)
    for split in index.splits.values():
        for number in (len(split.shards), split.tokens, split.text_bytes, split.documents):
            assert f"{number:,} " in out
    assert "bytes, 257 ids, id 256 ends a document; lossless" in out
    assert index.tool_version in out and "source: field" in out and str(shards) in out


def test_inspect_reports_a_lossy_tokenizer(source, tmp_path, capsys):
    prepare("prepare_text.py", "--input", source, "--output", tmp_path / "out", "--tokenizer",
            shared("data/spm/trax_sentencepiece.model"))  # fmt: skip
    assert main(["data", "inspect", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "32,000 ids" in out and "lossy: its normaliser" in out
    assert main(["data", "verify", str(tmp_path / "out")]) == 0
    (tmp_path / "out" / "tokenizer.model").unlink()
    assert main(["data", "inspect", str(tmp_path / "out")]) == 2
    assert "tokenizer.model: no such file; copy the model" in capsys.readouterr().err


def test_verify_reports_missing_and_corrupt_shards(shards, capsys):
    assert main(["data", "verify", str(shards)]) == 0
    index = read_index(shards)
    count = sum(len(split.shards) for split in index.splits.values())
    assert f"all {count} shards are intact" in capsys.readouterr().out
    (shards / "train-00000.tar").unlink()
    content = bytearray((shards / "train-00002.tar").read_bytes())
    content[index.splits["train"].shards[2].members.offsets[3] + 700] ^= 1
    (shards / "train-00002.tar").write_bytes(content)
    assert main(["data", "verify", str(shards)]) == 1
    out, err = capsys.readouterr()
    assert f"2 errors in {count} shards" in out
    missing, wrong = err.splitlines()
    assert "train-00000.tar: the shard is missing" in missing
    assert "train-00002.tar: member 3: the checksum differs" in wrong


def test_sample_is_reproducible(shards, capsys):
    options = ["--split", "validation", "--windows", "2", "--length", "400", "--seed", "5"]
    assert main(["data", "sample", str(shards), *options]) == 0
    out = capsys.readouterr().out
    assert out.count("--- validation, from token ") == 2
    assert "[bold]again[/bold]" in out and "<end of document>" in out
    assert main(["data", "sample", str(shards), *options]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("scheme", ["http", "pipe", "file"])
def test_verbs_read_remote_shards(shards, capsys, scheme):
    with serve(str(shards)) as (url, _):
        location = {"http": url, "pipe": f"pipe:cat {shards}/{{}}", "file": f"file://{shards}"}[
            scheme
        ]
        for verb in ("inspect", "verify", "sample"):
            assert main(["data", verb, location]) == 0, verb
    out, err = capsys.readouterr()
    assert "shards are intact" in out and not err


def test_images_are_drawn(tmp_path, capsys):
    np.save(tmp_path / "digits.npy", load_digits().images.astype(np.uint8))
    prepare("prepare_images.py", "--input", tmp_path / "digits.npy", "--output", tmp_path / "out")
    for verb in ("inspect", "verify", "sample"):
        assert main(["data", verb, str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "64 tokens each" in out and "[8, 8, 1]" in out
    assert sum(set(line) <= set(" .:-=+*#%@") and len(line) == 16 for line in out.split("\n")) == 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{empty}"], "index.json: no such file; name a folder written by data_prep"),
        (["verify", "{empty}"], "index.json: no such file"),
        (["sample", "{shards}", "--split", "dev"], "the split 'dev' is empty; use one of train"),
        (["sample", "{shards}", "--windows", "0"], "expected integers above 0"),
        (["sample", "{shards}", "--seed", "-1"], "--seed: expected an integer, 0 or above"),
        (["inspect", "http://127.0.0.1:9/x"], "index.json: cannot be read"),
        (["inspect", "pipe:false {}"], "false index.json: cannot be read"),
    ],
)
def test_user_errors_exit_with_2_in_one_line(shards, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    filled = [word.format(empty=tmp_path / "empty", shards=shards) if word != "pipe:false {}"
              else word for word in arguments]  # fmt: skip
    assert main(["data", *filled]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("hg-scale data: ") and err.count("\n") == 1


def test_closed_pipe_is_no_error(shards):
    """As of `| head`."""
    command = f"{sys.executable} -m hg_scale.commands.main data sample {shards} --windows 3000"
    done = subprocess.run(["bash", "-c", f"{command} | head -1"], capture_output=True, text=True,
                          cwd=ROOT, timeout=120)  # fmt: skip
    assert done.stdout.startswith("--- train") and done.stderr == ""
