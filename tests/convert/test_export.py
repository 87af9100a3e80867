"""Exports: the same numbers, readable without hg_scale, written completely or not at all."""

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
from hg_scale.checkpoint.fragments import KINDS
from hg_scale.checkpoint.load import CheckpointReader
from hg_scale.checkpoint.manifest import read_manifest, seal
from hg_scale.commands.main import main
from hg_scale.config.load import parse_config
from hg_scale.convert.export import export, load_export
from hg_scale.convert.open import open_source
from hg_scale.convert.to_checkpoint import to_checkpoint
from hg_scale.data.progress import ProgressBar
from hg_scale.model.hourglass import Hourglass
from tests.convert.trained import LAYOUTS, TrainedCheckpoint
from tests.convert.verified import verify
from tests.runs import train_in
from tests.training.models import random_batch
from tests.world import Worlds

Get = Callable[[str], TrainedCheckpoint]


def exported(trained: TrainedCheckpoint, out: Path, **options: object) -> Path:
    difference = export(open_source(trained.path), out, report=ProgressBar(), **options)  # type: ignore[arg-type]
    assert difference == 0
    return out


def full_tensors(path: Path, kind: str = "fp32") -> dict[str, torch.Tensor]:
    source = open_source(path)
    return {name: source.full_tensor(name, kind) for name in source.shapes}


def assert_bit_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("kind", LAYOUTS)
def test_checkpoint_export_import_is_bit_equal(trained: Get, tmp_path: Path, kind: str) -> None:
    folder = exported(trained(kind), tmp_path / "out")
    reader = CheckpointReader(trained(kind).path)
    weights = {name: reader.full_tensor(name) for name in full_tensors(folder)}
    assert_bit_equal(full_tensors(folder), weights)
    to_checkpoint(open_source(folder), tmp_path / "back", report=ProgressBar())
    verify(tmp_path / "back")
    assert_bit_equal(full_tensors(tmp_path / "back"), weights)


def test_import_starts_from_step_0_without_moments(trained: Get, tmp_path: Path) -> None:
    folder = exported(trained("plain"), tmp_path / "out")
    to_checkpoint(open_source(folder), tmp_path / "back", report=ProgressBar())
    manifest = CheckpointReader(tmp_path / "back").manifest
    assert (manifest["step"], manifest["optimizer_step"]) == (0, 0)
    assert manifest["progress"] == {"step": 0, "position": 0, "skipped": 0, "data": {}}
    for kind in KINDS[1:]:
        assert not any(moment.any() for moment in full_tensors(tmp_path / "back", kind).values())
    assert not (tmp_path / "back").with_name(".back.converting").exists()


@pytest.mark.parametrize("kind", ["tp2pp2", "zero3"])
def test_loaded_model_computes_the_loss_of_the_next_step(
    trained: Get, tmp_path: Path, kind: str
) -> None:
    """The plain model of the export computes the loss that the engine computed."""
    model = load_export(exported(trained(kind), tmp_path / "out"))
    config = parse_config(trained(kind).tree)
    batch = random_batch(config, 3)
    with torch.no_grad():
        loss = float(model(batch[:, :-1], batch[:, 1:]))
    assert loss == pytest.approx(trained(kind).losses[0], rel=1e-5)


def test_several_files_written_by_several_processes(trained: Get, tmp_path: Path) -> None:
    one = exported(trained("zero3"), tmp_path / "one")
    many = exported(trained("zero3"), tmp_path / "many", shard_bytes=100_000, workers=2)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in many.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == 4 * open_source(many).parameters
    assert_bit_equal(full_tensors(one), full_tensors(many))
    load_export(many)


def test_bf16(trained: Get, tmp_path: Path) -> None:
    source = open_source(trained("plain").path)
    difference = export(source, tmp_path / "out", dtype="bf16", report=ProgressBar())
    assert 0 < difference < 0.05
    for name, value in full_tensors(tmp_path / "out").items():
        assert torch.equal(value, source.full_tensor(name).bfloat16().float())
    assert load_export(tmp_path / "out").get_parameter("head.linear.weight").dtype == torch.bfloat16


def test_loads_with_torch_and_safetensors_alone(trained: Get, tmp_path: Path) -> None:
    """Run the code of the export's README where hg_scale cannot be imported."""
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


def test_model_card_and_config(trained: Get, tmp_path: Path) -> None:
    folder = exported(trained("zero3"), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert (config["step"], config["precision"], config["tokenizer"]) == (2, "fp32", None)
    assert config["source"]["layout"] == {"tensor": 1, "pipeline": 1, "data": 2, "zero_stage": 3}
    assert Hourglass(parse_config({"model": config["model"]}).model, seed=None)
    assert str(tmp_path) not in (folder / "config.json").read_text()
    readme = (folder / "README.md").read_text()
    assert "have 64 rows, of which those after the first 61 are padding" in readme


def test_existing_folder_is_not_overwritten(trained: Get, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out: exists already"):
        exported(trained("plain"), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_full_disk_leaves_nothing(
    trained: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_file.os, "pwrite", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        exported(trained("plain"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class Killed(ProgressBar):
    """Kills this process at the first progress report."""

    def advance(self, count: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def export_and_die(checkpoint: Path, out: Path) -> None:
    export(open_source(checkpoint), out, report=Killed())


def test_kill_leaves_nothing_that_looks_complete(trained: Get, tmp_path: Path) -> None:
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


def test_weights_that_are_not_finite_are_refused(trained: Get, tmp_path: Path) -> None:
    class Broken(type(open_source(trained("plain").path))):  # type: ignore[misc]
        def _read(self, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
            value = super()._read(name, kind, start, stop)
            return value / 0 if name == "head.linear.bias" else value

    with pytest.raises(CheckpointError, match="of head.linear.bias: .* not finite"):
        export(Broken(trained("plain").path), tmp_path / "out", report=ProgressBar())
    assert list(tmp_path.iterdir()) == []


CORRUPTIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda out: (out / "config.json").unlink(), "does not contain its model"),
    "truncated config": (
        lambda out: (out / "config.json").write_text('{"model": '), "cannot be read"),
    "another model": (
        lambda out: edit(out, lambda model: model.update(d_ff=96)),
        r"pre.0.ff.up.weight has shape \(64, 32\), the model '1@1 2@3 1@1' needs \(96, 32\)"),
    "a deeper model": (
        lambda out: edit(out, lambda model: model.update(hierarchy="2@1 2@3 1@1")),
        "pre.1.attention_norm.weight is missing"),
    "a shallower model": (
        lambda out: edit(out, lambda model: model.update(hierarchy="1@1 1@3 1@1")),
        "the model has no parameter level0.stack.1"),
    "an invalid model": (
        lambda out: edit(out, lambda model: model.update(d_model=33)), "model.*heads"),
    "truncated": (
        lambda out: os.truncate(out / "model.safetensors", 5000), "cannot be read"),
    "a pickle": (
        lambda out: torch.save({}, out / "model.safetensors"), "cannot be read"),
}  # fmt: skip


def edit(out: Path, change: Callable[[dict[str, object]], None]) -> None:
    config = json.loads((out / "config.json").read_text())
    change(config["model"])
    (out / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corrupt_export_is_refused_in_one_line(
    trained: Get, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    corrupt, message = CORRUPTIONS[kind]
    out = exported(trained("plain"), tmp_path / "out")
    corrupt(out)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(out)
    assert "\n" not in str(caught.value)
    assert main(["convert", "import", str(out), str(tmp_path / "back")]) == 2
    assert not (tmp_path / "back").exists()


def test_run_export_and_import_have_equal_bits_per_byte(
    worlds: Worlds, config: Path, corpus: Path, tmp_path: Path
) -> None:
    """Bits per byte are equal to the last digit, and a run can start from the import."""
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
    assert first["loss"] < last[0]["loss"] - 0.1  # unlike a new model


def test_export_is_not_evaluated_on_data_of_another_tokenizer(
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
def test_data_of_another_tokenizer_is_refused(
    worlds: Worlds,
    config: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verb: str,
) -> None:
    """The corpus was prepared again since; older manifests name the tokenizer elsewhere."""
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
        tokenizer = open_source(path).tokenizer
        assert tokenizer and tokenizer["vocab_size"] == 257
        capsys.readouterr()
        assert main(["convert", verb, str(run), str(out)]) == 2
        line = capsys.readouterr().err
        assert "trained with the tokenizer name bytes, vocab_size 257" in line, line
        assert line.count("\n") == 1
        assert not out.exists()


def test_tokenizer_is_exported(trained: Get, tmp_path: Path) -> None:
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
