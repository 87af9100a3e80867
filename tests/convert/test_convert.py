"""`hg-scale convert` as it is typed: what it says, and how it ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hg_scale.checkpoint.checksum import Checksum
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.find import read_manifest
from hg_scale.checkpoint.jobs import run_jobs
from hg_scale.checkpoint.versions import seal
from hg_scale.commands.main import main
from hg_scale.config.load import parse_config
from hg_scale.config.schema import Config
from hg_scale.convert.open import open_source
from hg_scale.errors import UserError
from hg_scale.evaluation.loaded_model import load
from hg_scale.training.resume import find_resume_checkpoint
from tests.convert.trained import Trained

Get = Callable[[str], Trained]


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


@pytest.fixture
def copy(trained: Get, tmp_path: Path) -> Path:
    """A checkpoint of DP2, ZeRO 3, to be damaged."""
    return Path(shutil.copytree(trained("zero3").path, tmp_path / "copy"))


def change_tensor(path: Path, key: str, change: Callable[[torch.Tensor], object]) -> None:
    """Write a rank's file anew, and its checksum."""
    file, manifest = path / "rank-00000.safetensors", path / "manifest.json"
    tensors = load_file(file)
    change(tensors[key])
    save_file(tensors, file)
    tree = json.loads(manifest.read_text())
    tree["files"][0] |= {
        "bytes": file.stat().st_size,
        "checksum": Checksum(path)(file.name),
    }
    manifest.write_text(json.dumps(seal(tree)))


def test_inspect(trained: Get, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("inspect", trained("tp2pp2").path) == 0
    told = capsys.readouterr().out
    for words in (
        "tensor 2 x pipeline 2 x data 1, ZeRO 1", "17 tokens", "all finite", "head.linear.weight",
        "4, ", "fp32, exp_avg, exp_avg_sq",
    ):  # fmt: skip
        assert words in told
    assert convert("inspect", trained("tp2pp2").path.parent.parent, "--brief") == 2
    assert convert("inspect", trained("tp2pp2").path, "--brief", "--workers", 2) == 0
    assert "all finite" not in capsys.readouterr().out


def test_inspect_shows_what_is_not_finite(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_tensor(copy, "0.exp_avg", lambda t: t.view(-1)[0].fill_(float("inf")))
    assert convert("inspect", copy) == 1
    assert "1 elements are not finite" in capsys.readouterr().out


def test_verify(trained: Get, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("verify", trained("zero3").path) == 0
    assert "a whole checkpoint of step 2" in capsys.readouterr().out
    flip(copy / "rank-00001.safetensors")
    assert convert("verify", copy, "--workers", 2) == 1
    assert "rank-00001.safetensors: changed since it was written" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["export", "import", "to-hf", "to-deepspeed", "average"])
def test_damage_goes_nowhere(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """No conversion gives flipped bits a new, valid checksum."""
    flip(copy / "rank-00001.safetensors")
    out = tmp_path / "out"
    options = ["--out", out] if verb == "average" else [out]
    assert convert(verb, copy, *options) == 2
    told = capsys.readouterr().err
    assert "rank-00001.safetensors: changed since it was written" in told.splitlines()[-1]
    assert not out.exists()


def test_damage_is_not_evaluated(copy: Path) -> None:
    flip(copy / "rank-00001.safetensors")
    with pytest.raises(UserError, match="rank-00001.safetensors: changed since it was written"):
        load(copy)


def flip(file: Path) -> None:
    """Turn a bit of the last tensor."""
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def test_the_seed_goes_along(copy: Path, tmp_path: Path) -> None:
    """The whole configuration does, through DeepSpeed's format, too: data goes on in its order."""
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
        assert lines[0].startswith(f"training.seed is 1, that of {name} was 7")


def test_a_seed_that_is_not_known_is_not_told(copy: Path, tmp_path: Path) -> None:
    """An export says none, and from the first window on there is none to keep to."""
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
    """What a new run that begins there finds to tell."""
    begun = config.checkpoint.model_copy(update={"start_from": str(path)})
    found = find_resume_checkpoint(
        config.model_copy(update={"checkpoint": begun}), path.parent / "no run", {}, lines
    )
    assert found == path


def test_verify_tells_every_fault(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_tensor(copy, "0.exp_avg_sq", lambda t: t.view(-1)[0].fill_(-1.0))
    change_tensor(copy, "1.fp32", lambda t: t.view(-1)[:2].fill_(float("nan")))
    assert convert("verify", copy) == 1
    told = capsys.readouterr()
    assert "2 elements are not finite" in told.err
    assert "1 elements are negative" in told.err
    assert "2 faults" in told.out


def test_verify_finds_a_hole(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    told = capsys.readouterr().out
    assert "1 of" in told and "0.5" in told
    assert convert("export", copy, tmp_path / "out") == 0
    assert convert("diff", copy, tmp_path / "out") == 0
    assert convert("diff", trained("zero3").path, tmp_path / "out") == 1
    capsys.readouterr()
    assert convert("diff", copy, trained("plain").path) == 2
    assert "of different models: model.hierarchy" in capsys.readouterr().err


def test_weights_alone_claim_no_moments(
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
def test_a_largest_file_of_no_size(
    trained: Get, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    out = tmp_path / "out"
    assert convert("export", trained("plain").path, out, "--shard-gb", size) == 2
    assert "expected more than 0, and an end" in capsys.readouterr().err


def test_an_overlap_that_makes_up_for_a_hole(copy: Path) -> None:
    """The count of elements is right; what would be read is not."""
    tree = read_manifest(copy)
    second = next(f for f in tree["files"][1]["fragments"] if f["start"])
    second["start"] -= 1
    (copy / "manifest.json").write_text(json.dumps(seal(tree)))
    with pytest.raises(CheckpointError, match="is covered by"):
        open_source(copy).whole(second["name"])


def test_average_and_its_use(trained: Get, tmp_path: Path) -> None:
    path = trained("zero3").path
    assert convert("average", path, path, path, "--out", tmp_path / "mean") == 0
    assert convert("export", tmp_path / "mean", tmp_path / "out") == 0
    assert convert("diff", path, tmp_path / "out") == 0  # the mean of equals is the same


def test_what_is_nothing_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert("inspect", tmp_path / "nowhere") == 2
    assert convert("inspect", tmp_path) == 2
    told = capsys.readouterr().err.splitlines()
    assert "no such file or folder" in told[0]
    assert "expected a run, a checkpoint" in told[1]
    (tmp_path / "rank-00000.safetensors").touch()
    assert convert("verify", tmp_path) == 2
    assert "the save was never finished" in capsys.readouterr().err


def die(item: int) -> int:
    import os

    os._exit(1)


def test_a_worker_that_dies_is_told_of() -> None:
    from hg_scale.checkpoint.errors import CheckpointError

    with pytest.raises(CheckpointError, match="a worker process died"):
        list(run_jobs(die, [1, 2, 3], workers=2))


def test_sources_are_sent_to_workers(trained: Get) -> None:
    import pickle

    source = open_source(trained("zero3").path)
    again = pickle.loads(pickle.dumps(source))
    name = next(iter(source.shapes))
    assert torch.equal(source.whole(name), again.whole(name))
