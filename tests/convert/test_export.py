"""Exports: the same numbers, in files that need nothing of ours, there whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hg_scale.checkpoint import safetensors_file
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.find import read_manifest
from hg_scale.checkpoint.fragments import KINDS
from hg_scale.checkpoint.load import CheckpointReader
from hg_scale.checkpoint.versions import seal
from hg_scale.commands.main import main
from hg_scale.config.load import parse_config
from hg_scale.convert.export import export, load_export
from hg_scale.convert.open import open_source
from hg_scale.convert.to_checkpoint import to_checkpoint
from hg_scale.data.progress import ProgressBar
from hg_scale.model.hourglass import Hourglass
from tests.convert.trained import LAYOUTS, Trained
from tests.convert.verified import verify
from tests.runs import train_in
from tests.training.models import random_batch
from tests.world import Worlds

Get = Callable[[str], Trained]


def exported(trained: Trained, out: Path, **options: object) -> Path:
    difference = export(open_source(trained.path), out, report=ProgressBar(), **options)  # type: ignore[arg-type]
    assert difference == 0
    return out


def whole(path: Path, kind: str = "fp32") -> dict[str, torch.Tensor]:
    source = open_source(path)
    return {name: source.whole(name, kind) for name in source.shapes}


def assert_bit_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("kind", LAYOUTS)
def test_checkpoint_export_import_is_bit_equal(trained: Get, tmp_path: Path, kind: str) -> None:
    folder = exported(trained(kind), tmp_path / "out")
    reader = CheckpointReader(trained(kind).path)
    weights = {name: reader.whole(name) for name in whole(folder)}
    assert_bit_equal(whole(folder), weights)
    to_checkpoint(open_source(folder), tmp_path / "back", report=ProgressBar())
    verify(tmp_path / "back")
    assert_bit_equal(whole(tmp_path / "back"), weights)


def test_an_import_begins_anew(trained: Get, tmp_path: Path) -> None:
    folder = exported(trained("plain"), tmp_path / "out")
    to_checkpoint(open_source(folder), tmp_path / "back", report=ProgressBar())
    manifest = CheckpointReader(tmp_path / "back").manifest
    assert (manifest["step"], manifest["optimizer_step"]) == (0, 0)
    assert manifest["progress"] == {"step": 0, "position": 0, "skipped": 0, "data": {}}
    for kind in KINDS[1:]:
        assert not any(moment.any() for moment in whole(tmp_path / "back", kind).values())
    assert not (tmp_path / "back").with_name(".back.converting").exists()


@pytest.mark.parametrize("kind", ["tp2pp2", "zero3"])
def test_the_loaded_model_goes_on_with_the_loss(trained: Get, tmp_path: Path, kind: str) -> None:
    """The next step's loss, as the engine had it, from the plain model of the export."""
    model = load_export(exported(trained(kind), tmp_path / "out"))
    config = parse_config(trained(kind).tree)
    batch = random_batch(config, 3)
    with torch.no_grad():
        loss = float(model(batch[:, :-1], batch[:, 1:]))
    assert loss == pytest.approx(trained(kind).losses[0], rel=1e-5)


def test_several_files_by_several_processes(trained: Get, tmp_path: Path) -> None:
    one = exported(trained("zero3"), tmp_path / "one")
    many = exported(trained("zero3"), tmp_path / "many", shard_bytes=100_000, workers=2)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in many.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == 4 * open_source(many).parameters
    assert_bit_equal(whole(one), whole(many))
    load_export(many)


def test_bf16(trained: Get, tmp_path: Path) -> None:
    source = open_source(trained("plain").path)
    difference = export(source, tmp_path / "out", dtype="bf16", report=ProgressBar())
    assert 0 < difference < 0.05
    for name, value in whole(tmp_path / "out").items():
        assert torch.equal(value, source.whole(name).bfloat16().float())
    assert load_export(tmp_path / "out").get_parameter("head.linear.weight").dtype == torch.bfloat16


def test_it_loads_with_torch_and_safetensors_alone(trained: Get, tmp_path: Path) -> None:
    """The lines of its own README, where this package cannot be imported."""
    folder = exported(trained("plain"), tmp_path / "out", shard_bytes=30_000)
    readme = (folder / "README.md").read_text()
    lines = readme.split("## With torch and safetensors alone")[1].split("```")[1]
    code = lines.removeprefix("python\n") + "import sys; assert 'hg_scale' not in sys.modules\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert done.stdout == "torch.Size([64, 32])\n"


def test_reading_needs_no_cluster_library(trained: Get, tmp_path: Path) -> None:
    folder = exported(trained("plain"), tmp_path / "out")
    code = (
        "import sys; from pathlib import Path\n"
        "from hg_scale.convert.export import load_export\n"
        f"load_export(Path({str(folder)!r}))\n"
        "print([m for m in ('deepspeed', 'megatron', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_card_and_the_config(trained: Get, tmp_path: Path) -> None:
    folder = exported(trained("zero3"), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert (config["step"], config["precision"], config["tokenizer"]) == (2, "fp32", None)
    assert config["source"]["layout"] == {"tensor": 1, "pipeline": 1, "data": 2, "zero_stage": 3}
    assert Hourglass(parse_config({"model": config["model"]}).model, seed=None)
    assert str(tmp_path) not in (folder / "config.json").read_text()
    readme = (folder / "README.md").read_text()
    assert "have 64 rows, those past 61 are padding" in readme


def test_what_is_there_is_not_overwritten(trained: Get, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out: exists already"):
        exported(trained("plain"), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk(trained: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_file.os, "pwrite", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        exported(trained("plain"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class Killed(ProgressBar):
    """Kills this process halfway."""

    def advance(self, count: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def export_and_die(checkpoint: Path, out: Path) -> None:
    export(open_source(checkpoint), out, report=Killed())


def test_a_kill_leaves_nothing_that_looks_whole(trained: Get, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = "import sys; from pathlib import Path\n" + (
        "from tests.convert.test_export import export_and_die\n"
        "export_and_die(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(trained("plain").path), str(out)]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    assert not out.exists()
    exported(trained("plain"), out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_weights_that_are_not_finite_are_not_exported(trained: Get, tmp_path: Path) -> None:
    class Broken(type(open_source(trained("plain").path))):  # type: ignore[misc]
        def _read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
            value = super()._read(name, kind, start, stop)
            return value / 0 if name == "head.linear.bias" else value

    with pytest.raises(CheckpointError, match="its logits are not finite"):
        export(Broken(trained("plain").path), tmp_path / "out", report=ProgressBar())
    assert list(tmp_path.iterdir()) == []


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda out: (out / "config.json").unlink(), "does not say which model it is of"),
    "half a config": (
        lambda out: (out / "config.json").write_text('{"model": '), "cannot be read"),
    "another model": (
        lambda out: edit(out, lambda model: model.update(d_ff=96)),
        r"pre.0.ff.up.weight has shape \(64, 32\), the model '1@1 2@3 1@1' needs \(96, 32\)"),
    "a deeper model": (
        lambda out: edit(out, lambda model: model.update(hierarchy="2@1 2@3 1@1")),
        "pre.1.attention_norm.weight is missing"),
    "a shallower model": (
        lambda out: edit(out, lambda model: model.update(hierarchy="1@1 1@3 1@1")),
        "the model has no use for level0.stack.1"),
    "a faulty model": (
        lambda out: edit(out, lambda model: model.update(d_model=33)), "model.*heads"),
    "cut short": (
        lambda out: os.truncate(out / "model.safetensors", 5000), "cannot be read"),
    "a pickle": (
        lambda out: torch.save({}, out / "model.safetensors"), "cannot be read"),
}  # fmt: skip


def edit(out: Path, change: Callable[[dict[str, object]], None]) -> None:
    config = json.loads((out / "config.json").read_text())
    change(config["model"])
    (out / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("fault", DAMAGE)
def test_a_damaged_export_is_refused_in_a_line(
    trained: Get, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    damage, message = DAMAGE[fault]
    out = exported(trained("plain"), tmp_path / "out")
    damage(out)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(out)
    assert "\n" not in str(caught.value)
    assert main(["convert", "import", str(out), str(tmp_path / "back")]) == 2
    assert not (tmp_path / "back").exists()


def test_a_run_its_export_and_its_import_score_alike(
    worlds: Worlds, config: Path, corpus: Path, tmp_path: Path
) -> None:
    """Bits per byte are equal to the last digit; the import trains on."""
    run, out, back = tmp_path / "run", tmp_path / "out", tmp_path / "back"
    assert train_in(worlds, 2, tmp_path, "--config", str(config), "--run", str(run)).code == 0
    assert main(["convert", "export", str(run), str(out)]) == 0
    assert main(["convert", "import", str(out), str(back)]) == 0
    assert json.loads((out / "config.json").read_text())["tokenizer"]["name"] == "bytes"

    def score(path: Path) -> dict[str, object]:
        figures = tmp_path / "figures.json"
        data = ["--data", str(corpus), "--split", "validation", "--json", str(figures)]
        assert main(["evaluate", str(path), *data]) == 0
        return json.loads(figures.read_text())

    expected = score(run)
    for path in (out, back):
        assert score(path)["bits_per_byte"] == expected["bits_per_byte"]
    assert score(out)["step"] == 6
    again = tmp_path / "again"
    arguments = ["--config", str(config), "--set", f"checkpoint.start_from={back}"]
    done = train_in(worlds, 1, tmp_path, *arguments, "--run", str(again))
    assert done.code == 0
    assert f"resumed at step 0 from {back}" in done.output
    first = json.loads((again / "metrics.jsonl").read_text().splitlines()[0])
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert first["loss"] < last[0]["loss"] - 0.1  # it does not begin where a new model does


def test_an_export_is_not_scored_on_text_of_another_tokenizer(
    trained: Get, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = exported(trained("plain"), tmp_path / "out")
    assert main(["evaluate", str(out)]) == 2
    assert "an export names no data; give --data SHARDS" in capsys.readouterr().err
    config = json.loads((out / "config.json").read_text())
    config["tokenizer"] = {"name": "sentencepiece", "vocab_size": 64, "eod": 2, "sha256": "0" * 64}
    (out / "config.json").write_text(json.dumps(config))
    assert main(["evaluate", str(out), "--data", str(corpus)]) == 2
    assert "made with another tokenizer (bytes, vocabulary 257)" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["export", "to-hf"])
def test_another_tokenizer_is_not_exported(
    worlds: Worlds,
    config: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verb: str,
) -> None:
    """The data's folder was prepared anew since; whichever place of the manifest says so."""
    shards, run, out = tmp_path / "shards", tmp_path / "run", tmp_path / "out"
    shutil.copytree(corpus, shards)
    sets = ["--set", f"data.path={shards}", "--set", "training.validate_every=0"]
    arguments = ["--config", str(config), "--run", str(run), "--stop-at", "1", *sets]
    assert train_in(worlds, 1, tmp_path, *arguments).code == 0
    path = run / "checkpoints" / "step-00000001"
    assert read_manifest(path)["tokenizer"]["name"] == "bytes"
    index = shards / "index.json"
    other = json.loads(index.read_text())
    other["tokenizer"] |= {"vocab_size": 256, "eod": None}
    index.write_text(json.dumps(other))
    for remove in ((), ("tokenizer",)):
        tree = {key: value for key, value in read_manifest(path).items() if key not in remove}
        (path / "manifest.json").write_text(json.dumps(seal(tree)))
        told = open_source(path).tokenizer
        assert told and told["vocab_size"] == 257
        capsys.readouterr()
        assert main(["convert", verb, str(run), str(out)]) == 2
        line = capsys.readouterr().err
        assert "trained with the tokenizer name bytes, vocab_size 257" in line, line
        assert line.count("\n") == 1
        assert not out.exists()


def test_a_tokenizer_goes_along(trained: Get, tmp_path: Path) -> None:
    class Pieces:
        model = b"the model"
        eod = 2

        class identity:
            @staticmethod
            def model_dump() -> dict[str, object]:
                return {"name": "sentencepiece", "vocab_size": 64, "eod": 2, "sha256": "ab" * 32}

    out = exported(trained("plain"), tmp_path / "out", tokenizer=Pieces())
    assert (out / "tokenizer.model").read_bytes() == b"the model"
    assert "sha256 `abababababab`" in (out / "README.md").read_text()
    to_checkpoint(open_source(out), tmp_path / "back", report=ProgressBar())
    shutil.rmtree(out)
    assert open_source(tmp_path / "back").tokenizer["sha256"] == "ab" * 32  # type: ignore[index]
