"""`hg-scale generate` on runs, checkpoints and exports, of text and images."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from hg_scale.checkpoint.find import find_latest
from hg_scale.checkpoint.manifest import seal
from hg_scale.commands.main import main
from tests.runs import TINY, train_in
from tests.shared import ROOT
from tests.world import Worlds


@pytest.fixture(scope="module")
def run(worlds: Worlds, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on text, with a checkpoint."""
    folder = tmp_path_factory.mktemp("text")
    return train_run(worlds, folder, corpus)


@pytest.fixture(scope="module")
def digits(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on grayscale images of 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("images")
    np.save(folder / "digits.npy", (load_digits().images * 15.9).astype(np.uint8))
    script = ROOT / "data_prep" / "prepare_images.py"
    command = [sys.executable, str(script), "--input", str(folder / "digits.npy"), "--output",
               str(folder / "shards")]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return train_run(worlds, folder, folder / "shards", "model.sequence_length=64")


def train_run(worlds: Worlds, folder: Path, shards: Path, *sets: str) -> Path:
    (folder / "tiny.json").write_text(json.dumps({**TINY, "data": {"path": str(shards)}}))
    overrides = [word for key in sets for word in ("--set", key)]
    done = train_in(worlds, 1, folder, "--config", str(folder / "tiny.json"), "--run",
                    str(folder / "run"), *overrides)  # fmt: skip
    assert done.code == 0, done.output
    return folder / "run"


def test_text_after_a_prompt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text is longer than the context of 32; the run and its checkpoint give the same."""
    options = ["--prompt", "the quick", "--tokens", "60", "--seed", "5"]
    assert main(["generate", str(run), *options]) == 0
    text = capsys.readouterr().out
    assert text.startswith("the quick")
    checkpoint = find_latest(run / "checkpoints")
    assert main(["generate", str(checkpoint), *options]) == 0
    assert capsys.readouterr().out == text
    assert main(["generate", str(run), *options[:-1], "6"]) == 0
    assert capsys.readouterr().out != text
    assert main(["generate", str(run), *options, "--precision", "bf16"]) == 0
    assert capsys.readouterr().out.startswith("the quick")


def test_summary_shows_a_sample(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", str(run), "--sample", "40"]) == 0
    head, sample = capsys.readouterr().out.split("(temperature 0.8):\n")
    assert "hourglass 1@1 1@2 1@1, step 6" in head and sample.strip()


def test_prompts_from_a_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts").write_text("the\ndocument 1 says\n")
    output = tmp_path / "texts.jsonl"
    options = ["--prompts", str(tmp_path / "prompts"), "--count", "2", "--tokens", "20"]
    assert main(["generate", str(run), *options, "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["the"] * 2 + ["document 1 says"] * 2
    assert [f"--- {n} of 4: " in shown for n in (1, 2, 3, 4)] == [True] * 4
    assert all(1 <= len(line["text"]) <= 20 for line in lines)
    assert lines[0]["text"] != lines[1]["text"]


def test_text_is_streamed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        flushed: list[str] = []

        def flush(self) -> None:
            self.flushed.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    assert main(["generate", str(run), "--prompt", "the", "--tokens", "8", "--top-k", "100"]) == 0
    lengths = [len(text) for text in terminal.flushed]
    assert lengths == sorted(lengths) and len(set(lengths)) > 3


def test_output_file_is_written_although_stdout_is_closed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

        def fileno(self) -> int:
            return opened

    with open(tmp_path / "stdout", "w") as stdout:
        opened = stdout.fileno()
        monkeypatch.setattr(sys, "stdout", Closed())
        output = tmp_path / "texts.jsonl"
        options = ["--count", "2", "--tokens", "5", "--output", str(output)]
        main(["generate", str(run), "--prompt", "the", *options])
    assert [json.loads(line)["prompt"] for line in output.read_text().splitlines()] == ["the"] * 2


def test_data_of_another_tokenizer_is_refused(
    run: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = digits.parent / "shards"
    for verb in (["generate", "--tokens", "3"], ["evaluate", "--windows", "2"]):
        assert main([verb[0], str(run), "--data", str(shards), *verb[1:]]) == 2
        assert f"{shards}: made with another tokenizer (" in capsys.readouterr().err


def test_run_on_bytes_generates_without_its_corpus(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = find_latest(run / "checkpoints")
    assert checkpoint
    copy = tmp_path / "run" / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["config"]["data"]["path"] = str(tmp_path / "gone")
    (copy / "manifest.json").write_text(json.dumps(seal(manifest)))
    outputs = []
    for model in (run, tmp_path / "run"):
        assert main(["generate", str(model), "--prompt", "the", "--tokens", "9"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != ""
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "its data is missing; give --data SHARDS or FILE" in capsys.readouterr().err


def test_evaluate_all_scores_every_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--windows", "2", "--json", str(tmp_path / "scores.json")]
    assert main(["evaluate", str(run), "--all", *options]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    (score,) = json.loads((tmp_path / "scores.json").read_text())
    assert line.startswith("step         6  ") and f"{score['bits_per_byte']:.4f} bits" in line
    assert main(["evaluate", str(find_latest(run / "checkpoints")), "--all"]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_generation_imports_neither_megatron_nor_deepspeed(run: Path) -> None:
    """Both are blocked: an import of either would raise."""
    code = (
        "import sys; sys.modules['megatron'] = sys.modules['deepspeed'] = None\n"
        "from hg_scale.commands.main import main\n"
        "code = main(sys.argv[1:])\n"
        "heavy = {name.split('.')[0] for name in sys.modules if sys.modules[name]}\n"
        "print(sorted(heavy & {'megatron', 'deepspeed', 'webdataset', 'wandb', 'scipy'}))\n"
        "print('compiler', 'torch._dynamo' in sys.modules)\n"
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "generate", str(run), "--prompt", "a", "--tokens", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n[]\ncompiler False\n")


def test_images_are_generated_as_a_grid(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.png"
    assert main(["generate", str(digits), "--count", "5", "--output", str(page)]) == 0
    assert "5 images" in capsys.readouterr().out
    assert Image.open(page).size == (3 * 66 + 2, 2 * 66 + 2)


def test_export_of_an_image_model_generates_images(
    digits: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An export, and an export of it, record the shape; text is refused."""
    first, again = tmp_path / "first", tmp_path / "again"
    assert main(["convert", "export", str(digits), str(first)]) == 0
    assert main(["convert", "export", str(first), str(again)]) == 0
    page = tmp_path / "page.png"
    pages = []
    for model in (digits, first, again):
        assert main(["generate", str(model), "--count", "2", "--output", str(page)]) == 0
        pages.append(page.read_bytes())
    assert pages[0] == pages[1] == pages[2]
    capsys.readouterr()
    for arguments, message in (
        (["generate", str(first), "--prompt", "a"], "--prompt is for text"),
        (["evaluate", str(first), "--data", __file__], "a plain file is scored as text"),
        (["evaluate", str(first), "--data", str(corpus)], "contains text, but"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_images_are_completed(digits: Path, tmp_path: Path) -> None:
    """Kept part, two completions, original: the upper half of all four is the same."""
    originals = (load_digits().images[:3] * 15.9).astype(np.uint8)
    np.save(tmp_path / "some.npy", originals)
    page = tmp_path / "page.png"
    options = ["--complete", str(tmp_path / "some.npy"), "--count", "2", "--output", str(page)]
    assert main(["generate", str(digits), *options]) == 0
    pixels = np.asarray(Image.open(page))
    assert pixels.shape == (3 * 66 + 2, 4 * 66 + 2)
    for line, original in enumerate(originals):
        cells = [pixels[2 + line * 66 :, 2 + column * 66 :][:64:8, :64:8] for column in range(4)]
        assert all((cell[:4] == original[:4]).all() for cell in cells)
        assert (cells[0][4:] == 128).all() and (cells[3] == original).all()
        assert (cells[1][4:] != cells[2][4:]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "0"], "--tokens"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--top-k", "0"], "--top-k"),
        (["--keep", "1"], "--keep"),
        (["--keep", "0.3"], "--keep: needs --complete"),
        (["--context", "9" * 14, "--tokens", "9" * 14], "out of memory; a smaller --batch"),
        (["--context", "1"], "--context"),
        (["--batch", "0"], "--batch"),
        (["--count", "0"], "--count"),
        (["--prompt", "a", "--prompts", "b"], "give only one of them"),
        (["--prompts", "/nowhere/prompts"], "cannot be read"),
        (["--prompts", "/dev/null"], "is empty"),
        (["--prompts", sys.executable], "is an ELF program, not text"),
        (["--complete", "a.png"], "is for images"),
        (["--data", "/nowhere"], "no such file"),
        (["--prompt", "a", "--tokens", "1", "--output", "/nowhere/a"], "cannot be written"),
    ],
)
def test_invalid_options_are_reported_in_one_line(
    run: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(run), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_unusable_models_are_reported_in_one_line(
    run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    for folder, options, message in (
        (tmp_path / "none", [], "no such folder"),
        (tmp_path, [], "without a checkpoint"),
        (run / "checkpoints", [], "expected a run folder (with config.json"),
        (digits, ["--prompt", "a"], "--prompt is for text"),
    ):
        assert main(["generate", str(folder), *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
