"""`hg-scale convert` as a command: its output and exit codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hg_scale.checkpoint.checksum import ComputeChecksum
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.jobs import run_jobs
from hg_scale.checkpoint.manifest import read_manifest, seal
from hg_scale.commands.main import main
from hg_scale.config.load import parse_config
from hg_scale.config.schema import Config
from hg_scale.convert.open import open_source
from hg_scale.errors import UserError
from hg_scale.evaluation.loaded_model import load
from hg_scale.training.resume import find_resume_checkpoint
from tests.convert.trained import TrainedCheckpoint

Get = Callable[[str], TrainedCheckpoint]


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


@pytest.fixture
def copy(trained: Get, tmp_path: Path) -> Path:
    """A checkpoint of DP2, ZeRO 3, to be corrupted."""
    return Path(shutil.copytree(trained("zero3").path, tmp_path / "copy"))


def change_tensor(path: Path, key: str, change: Callable[[torch.Tensor], object]) -> None:
    """Change a tensor in a rank's file, and its checksum in the manifest."""
    file, manifest = path / "rank-00000.safetensors", path / "manifest.json"
    tensors = load_file(file)
    change(tensors[key])
    save_file(tensors, file)
    tree = json.loads(manifest.read_text())
    tree["files"][0] |= {
        "bytes": file.stat().st_size,
        "checksum": ComputeChecksum(path)(file.name),
    }
    manifest.write_text(json.dumps(seal(tree)))


def test_inspect(trained: Get, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("inspect", trained("tp2pp2").path) == 0
    output = capsys.readouterr().out
    for text in (
        "tensor 2 x pipeline 2 x data 1, ZeRO 1", "17 tokens", "all finite", "head.linear.weight",
        "4, ", "fp32, exp_avg, exp_avg_sq",
    ):  # fmt: skip
        assert text in output
    assert convert("inspect", trained("tp2pp2").path.parent.parent, "--brief") == 2
    assert convert("inspect", trained("tp2pp2").path, "--brief", "--workers", 2) == 0
    assert "all finite" not in capsys.readouterr().out


def test_inspect_shows_infinite_numbers(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_tensor(copy, "0.exp_avg", lambda t: t.view(-1)[0].fill_(float("inf")))
    assert convert("inspect", copy) == 1
    assert "1 elements are not finite" in capsys.readouterr().out


def test_verify(trained: Get, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("verify", trained("zero3").path) == 0
    assert ": complete checkpoint of step 2" in capsys.readouterr().out
    flip(copy / "rank-00001.safetensors")
    assert convert("verify", copy, "--workers", 2) == 1
    assert "rank-00001.safetensors: changed since it was written" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["export", "import", "to-hf", "to-deepspeed", "average"])
def test_corrupt_checkpoint_is_not_converted(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """No conversion gives flipped bits a new, valid checksum."""
    flip(copy / "rank-00001.safetensors")
    out = tmp_path / "out"
    options = ["--out", out] if verb == "average" else [out]
    assert convert(verb, copy, *options) == 2
    errors = capsys.readouterr().err
    assert "rank-00001.safetensors: changed since it was written" in errors.splitlines()[-1]
    assert not out.exists()


def test_corrupt_checkpoint_is_not_evaluated(copy: Path) -> None:
    flip(copy / "rank-00001.safetensors")
    with pytest.raises(UserError, match="rank-00001.safetensors: changed since it was written"):
        load(copy)


def flip(file: Path) -> None:
    """Flip a bit of the last tensor."""
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def test_seed_and_configuration_are_kept(copy: Path, tmp_path: Path) -> None:
    """Through DeepSpeed's format too, so that the data continues in the same order."""
    tree = read_manifest(copy)
    tree["config"]["training"]["seed"] = 7
    (copy / "manifest.json").write_text(json.dumps(seal(tree)))
    assert convert("import", copy, tmp_path / "back") == 0
    assert convert("to-deepspeed", copy, tmp_path / "universal") == 0
    assert convert("from-deepspeed", tmp_path / "universal", tmp_path / "there") == 0
    for name in ("back", "there"):
        assert read_manifest(tmp_path / name)["config"] == tree["config"]
        lines: list[str] = []
        config = parse_config(tree["config"])
        start_from(config, tmp_path / name, lines)
        assert lines == []
        start_from(with_seed(config, 1), tmp_path / name, lines)
        assert lines[0].startswith(f"training.seed is 1 but {name} used 7")


def test_no_warning_about_an_unknown_seed(copy: Path, tmp_path: Path) -> None:
    """An export has no seed, and a run that starts its data from scratch needs none."""
    config = with_seed(parse_config(read_manifest(copy)["config"]), 3)
    assert convert("export", copy, tmp_path / "out") == 0
    assert convert("import", tmp_path / "out", tmp_path / "back") == 0
    assert convert("average", copy, copy, "--out", tmp_path / "mean") == 0
    for name in ("back", "mean"):
        assert "training" not in read_manifest(tmp_path / name)["config"]
        lines: list[str] = []
        start_from(config, tmp_path / name, lines)
        assert lines == []


def with_seed(config: Config, seed: int) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update={"seed": seed})})


def start_from(config: Config, path: Path, lines: list[str]) -> None:
    """Append what a new run that starts from `path` reports to `lines`."""
    section = config.checkpoint.model_copy(update={"start_from": str(path)})
    found = find_resume_checkpoint(
        config.model_copy(update={"checkpoint": section}), path.parent / "no run", {}, lines
    )
    assert found == path


def test_verify_reports_every_problem(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_tensor(copy, "0.exp_avg_sq", lambda t: t.view(-1)[0].fill_(-1.0))
    change_tensor(copy, "1.fp32", lambda t: t.view(-1)[:2].fill_(float("nan")))
    assert convert("verify", copy) == 1
    output = capsys.readouterr()
    assert "2 elements are not finite" in output.err
    assert "1 elements are negative" in output.err
    assert "2 problems" in output.out


def test_verify_finds_missing_elements(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = copy / "manifest.json"
    tree = json.loads(manifest.read_text())
    tree["files"][0]["fragments"][0]["length"] -= 1
    manifest.write_text(json.dumps(seal(tree)))
    assert convert("verify", copy) == 1
    assert "is covered by" in capsys.readouterr().err


def test_diff(trained: Get, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("diff", trained("zero3").path, copy) == 0
    assert "bit-equal" in capsys.readouterr().out
    change_tensor(copy, "0.fp32", lambda t: t.view(-1)[3].add_(0.5))
    assert convert("diff", trained("zero3").path, copy, "--workers", 2) == 1
    output = capsys.readouterr().out
    assert "1 of" in output and "0.5" in output
    assert convert("export", copy, tmp_path / "out") == 0
    assert convert("diff", copy, tmp_path / "out") == 0
    assert convert("diff", trained("zero3").path, tmp_path / "out") == 1
    capsys.readouterr()
    assert convert("diff", copy, trained("plain").path) == 2
    assert "of different models: model.hierarchy" in capsys.readouterr().err


def test_checkpoint_of_weights_alone_has_no_moments(
    trained: Get, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, mean = trained("zero3").path, tmp_path / "mean"
    assert convert("average", path, path, "--out", mean) == 0
    capsys.readouterr()
    assert convert("diff", mean, path) == 0
    assert "(fp32)" in capsys.readouterr().out
    assert convert("inspect", mean) == 0
    assert "exp_avg" not in capsys.readouterr().out
    assert convert("to-deepspeed", mean, tmp_path / "universal") == 0
    assert len(list(tmp_path.glob("universal/*/zero/**/exp_avg_sq.pt"))) == len(
        open_source(path).shapes
    )


@pytest.mark.parametrize("size", ["inf", "nan", "0", "-1"])
def test_invalid_file_size_is_refused(
    trained: Get, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    out = tmp_path / "out"
    assert convert("export", trained("plain").path, out, "--shard-gb", size) == 2
    assert "expected a number above 0" in capsys.readouterr().err


def test_duplicate_that_makes_up_for_a_missing_element_is_found(copy: Path) -> None:
    """The number of elements is right, but not their values."""
    tree = read_manifest(copy)
    second = next(f for f in tree["files"][1]["fragments"] if f["start"])
    second["start"] -= 1
    (copy / "manifest.json").write_text(json.dumps(seal(tree)))
    with pytest.raises(CheckpointError, match="is covered by"):
        open_source(copy).full_tensor(second["name"])


def test_average_of_equal_weights_is_bit_equal(trained: Get, tmp_path: Path) -> None:
    path = trained("zero3").path
    assert convert("average", path, path, path, "--out", tmp_path / "mean") == 0
    assert convert("export", tmp_path / "mean", tmp_path / "out") == 0
    assert convert("diff", path, tmp_path / "out") == 0


def test_other_paths_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("inspect", tmp_path / "nowhere") == 2
    assert convert("inspect", tmp_path) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "no such file or folder" in lines[0]
    assert "expected a run, a checkpoint" in lines[1]
    (tmp_path / "rank-00000.safetensors").touch()
    assert convert("verify", tmp_path) == 2
    assert "the save was never finished" in capsys.readouterr().err


def die(item: int) -> int:
    import os

    os._exit(1)


def test_death_of_a_worker_is_reported() -> None:
    with pytest.raises(CheckpointError, match="a worker process died"):
        list(run_jobs(die, [1, 2, 3], workers=2))


def test_sources_are_picklable(trained: Get) -> None:
    import pickle

    source = open_source(trained("zero3").path)
    again = pickle.loads(pickle.dumps(source))
    name = next(iter(source.shapes))
    assert torch.equal(source.full_tensor(name), again.full_tensor(name))
