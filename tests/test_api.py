"""The public Python API: docs/api.md runs, and its numbers are those of the commands."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch

import hg_scale
from hg_scale.commands.main import main
from hg_scale.data.inspection import printable
from hg_scale.errors import UserError
from hg_scale.evaluation.loaded_model import LoadedModel
from tests.runs import TINY, train_in
from tests.shared import ROOT
from tests.world import Worlds

TEXT = "document 3 says: the quick brown fox jumps over the lazy dog.\n" * 4


@pytest.fixture(scope="module")
def folder(worlds: Worlds, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository's after the quickstart, with a tiny run in its place."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "configs").symlink_to(ROOT / "configs")
    config = folder / "tiny.json"
    config.write_text(json.dumps({**TINY, "data": {"path": str(corpus)}}))
    run = str(folder / "runs" / "quickstart")
    done = train_in(worlds, 1, folder, "--config", str(config), "--run", run)
    assert done.code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def lm(folder: Path) -> LoadedModel:
    """The tiny run, loaded."""
    return hg_scale.load(folder / "runs" / "quickstart", device="cpu")


def test_every_line_of_the_page_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), names)
    lm, model, config = names["lm"], names["model"], names["config"]

    assert names["text"] == lm.generate("def main(", 100, top_p=0.9)
    assert 0 < len(names["text"]) <= 100 and names["text"] != names["greedy"]
    assert 0 < names["bits"] < 12
    output = capsys.readouterr().out
    assert f"6 cpu 1@1 1@2 1@1 {names['bits']}\n128 2000\n" in output
    assert f"torch.Size([2, 96, {config.padded_vocab}])" in output

    # A text that fits into one window is scored as model(ids, labels) does.
    assert names["loss"].item() / log(2) == pytest.approx(lm.bits_per_byte("def main():"), rel=1e-6)
    assert names["logits"].shape == (1, 11, lm.config.padded_vocab)

    zeros, ones = torch.zeros(1, 12, dtype=torch.int64), torch.ones(1, 12, dtype=torch.int64)
    assert (model(zeros) - model(ones)).abs().max() > 0.01
    again, other = (hg_scale.Hourglass(config, seed=seed) for seed in (1, 2))
    assert torch.equal(model(zeros), again(zeros))
    assert not torch.equal(model(zeros), other(zeros))


@pytest.mark.parametrize(
    "window", [{}, {"window": 24, "stride": 8}, {"window": 10, "first_token": "zero"}]
)
def test_bits_per_byte_equals_that_of_evaluate(
    lm: LoadedModel, folder: Path, tmp_path: Path, window: dict[str, Any]
) -> None:
    (tmp_path / "text").write_text(TEXT)
    options = [
        word for key, value in window.items() for word in (f"--{key.replace('_', '-')}", str(value))
    ]
    options += ["--data", str(tmp_path / "text"), "--json", str(tmp_path / "results.json")]
    assert main(["evaluate", str(folder / "runs" / "quickstart"), *options]) == 0
    expected = json.loads((tmp_path / "results.json").read_text())["bits_per_byte"]
    assert lm.bits_per_byte(TEXT, **window) == pytest.approx(expected, abs=1e-6)
    assert lm.bits_per_byte(TEXT.encode(), batch_size=3, **window) == pytest.approx(expected)


def test_generate_equals_the_command(
    lm: LoadedModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same defaults, and the same text for the same seed."""
    main(["generate", str(folder / "runs" / "quickstart"), "--prompt", "the", "--tokens", "40"])
    text = lm.generate("the", 40)
    assert capsys.readouterr().out == printable(f"the{text}") + "\n"
    assert lm.generate("the", 40, seed=1) == text != lm.generate("the", 40, seed=2)
    assert lm.generate("the", 40, greedy=True) == lm.generate("the", 40, temperature=0)


def test_defaults_are_those_of_the_command() -> None:
    import argparse

    from hg_scale.commands import generate

    parser = argparse.ArgumentParser()
    generate.add_options(parser)
    options = vars(parser.parse_args(["run"])) | {"tokens": generate.TOKENS}
    parameters = inspect.signature(LoadedModel.generate).parameters
    for name in ("tokens", "temperature", "top_k", "top_p", "seed", "context"):
        assert parameters[name].default == options[name], name


def test_run_checkpoint_and_export_give_the_same_model(
    lm: LoadedModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By relative paths, as strings and as Path objects."""
    monkeypatch.chdir(folder)
    assert main(["convert", "export", "runs/quickstart", str(tmp_path / "export")]) == 0
    checkpoint = os.path.relpath(lm.path, folder)
    for source in ("runs/quickstart", Path(checkpoint), checkpoint, tmp_path / "export"):
        loaded = hg_scale.load(source, device="cpu")
        assert loaded.step == 6
        assert loaded.generate("the", 20) == lm.generate("the", 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, "tokens=0: expected 1 or more"),
        ({"temperature": -1.0}, "temperature=-1.0: expected 0 or more"),
        ({"top_k": 0}, "top_k=0: expected 1 or more"),
        ({"top_p": 0.0}, "top_p=0.0: expected more than 0, up to 1"),
        ({"context": 1}, "context=1: expected 2 or more"),
    ],
)
def test_generate_refuses_values_out_of_range(
    lm: LoadedModel, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        lm.generate("the", **arguments)


def test_bits_per_byte_refuses_what_cannot_be_scored(lm: LoadedModel) -> None:
    with pytest.raises(UserError, match="^text: is empty"):
        lm.bits_per_byte("")
    with pytest.raises(UserError, match="^stride=33: expected 1 to the window of 32 tokens$"):
        lm.bits_per_byte(TEXT, stride=33)
    with pytest.raises(UserError, match="^window=0, batch_size=8: expected 1 or more$"):
        lm.bits_per_byte(TEXT, window=0)


def test_image_model_names_what_to_do_instead(lm: LoadedModel) -> None:
    images = LoadedModel(lm.model, lm.path, 6, None, lm.open_tokenizer, (4, 4, 3))
    with pytest.raises(UserError, match="contains images, so no text .* `hg-scale generate`$"):
        images.generate("the")
    with pytest.raises(UserError, match="contains images, so text .* `hg-scale evaluate`$"):
        images.bits_per_byte(TEXT)


def test_load_reports_errors_in_one_line(folder: Path) -> None:
    run = folder / "runs" / "quickstart"
    cases: list[tuple[str, dict[str, Any]]] = [
        ("nowhere: no such folder", {"folder": "nowhere"}),
        ("precision='fp8': expected fp32 or bf16", {"folder": run, "precision": "fp8"}),
        ("device='gpu': expected cpu, cuda", {"folder": run, "device": "gpu"}),
        ("/nowhere", {"folder": run, "data": Path("/nowhere")}),
    ]
    for message, arguments in cases:
        with pytest.raises(UserError) as raised:
            hg_scale.load(**arguments)
        assert message in str(raised.value) and "\n" not in str(raised.value)


def test_import_is_lazy() -> None:
    """Neither torch nor pydantic is imported before a name is used; unknown names raise."""
    code = (
        "import sys, hg_scale\n"
        "assert not {'torch', 'numpy', 'pydantic'} & sys.modules.keys()\n"
        "assert {'Hourglass', 'ModelConfig', 'load', 'load_config'} <= set(dir(hg_scale))\n"
        "hg_scale.load_config('configs/quickstart.json')\n"
        "assert 'torch' not in sys.modules\n"
        "assert not hasattr(hg_scale, 'nothing')\n"
        "from hg_scale import Hourglass\n"
        "assert 'torch' in sys.modules and hg_scale.Hourglass is Hourglass\n"
        "assert not {'deepspeed', 'megatron'} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_mistakes_in_a_session_are_reported_plainly(lm: LoadedModel) -> None:
    config = hg_scale.load_config(ROOT / "configs" / "quickstart.json")
    with pytest.raises(TypeError, match="expected a ModelConfig, got a Config; pass its `model`"):
        hg_scale.Hourglass(config)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="d_model 64 of level 0 is not divisible by its 5 heads"):
        hg_scale.Hourglass(hg_scale.ModelConfig(hierarchy="2@1", d_model=64, heads=5))
    with pytest.raises(UserError, match="overrides = .*expected a list of"):
        hg_scale.load_config(ROOT / "configs" / "quickstart.json", "model.d_model=128")
    for call in (lambda: lm.generate(5), lambda: lm.bits_per_byte(None)):  # type: ignore[arg-type]
        with pytest.raises(UserError, match="expected a str or bytes, got"):
            call()
    with pytest.raises(UserError, match="README.md: is a file; name a run folder"):
        hg_scale.load(ROOT / "README.md")
    assert lm.generate(b"the", tokens=5) == lm.generate("the", tokens=5)
    assert len(repr(lm)) < 300 and "step" in repr(lm)
