"""Imports of golden files and averages, and of every file that could contain a pickle."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.commands.main import main
from hg_scale.convert.average import AverageSource
from hg_scale.convert.export import export, load_export
from hg_scale.convert.open import open_source
from hg_scale.convert.to_checkpoint import to_checkpoint
from hg_scale.data.progress import ProgressBar
from tests.convert.test_export import full_tensors
from tests.convert.trained import TrainedCheckpoint
from tests.convert.verified import verify
from tests.golden import BOUND, read_golden
from tests.reference_model import make_file
from tests.shared import SHARED
from tests.test_golden import CASES

Get = Callable[[str], TrainedCheckpoint]


@pytest.fixture(scope="module")
def golden_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Generated ones, and those of the reference implementation if available."""
    folder = tmp_path_factory.mktemp("golden")
    names = ("flat", "three levels, linear", "attention+linear up", "two heads, odd vocabulary")
    made = [make_file(folder / f"{n}.npz", CASES[name], seed=n) for n, name in enumerate(names)]
    return made + sorted((SHARED / "golden").glob("*.npz"))


def test_golden_import_export_is_bit_equal(golden_files: list[Path], tmp_path: Path) -> None:
    for path in golden_files:
        name, golden = path.stem, read_golden(path)
        to_checkpoint(open_source(path), tmp_path / name / "in", report=ProgressBar())
        verify(tmp_path / name / "in")
        out = tmp_path / name / "out"
        export(open_source(tmp_path / name / "in"), out, report=ProgressBar())
        for key, value in full_tensors(out).items():
            assert torch.equal(value, torch.from_numpy(golden.weights[key].copy())), (name, key)


def test_exported_golden_file_computes_the_golden_logits(
    golden_files: list[Path], tmp_path: Path
) -> None:
    for path in golden_files:
        golden = read_golden(path)
        export(open_source(path), tmp_path / path.stem, report=ProgressBar())
        with torch.no_grad():
            padded = load_export(tmp_path / path.stem)(golden.ids)
        logits = padded[..., : golden.model.vocab_size].numpy()
        assert np.abs(logits - golden.logits).max() <= BOUND, path


def test_average_is_the_mean_of_the_weights(trained: Get, tmp_path: Path) -> None:
    first, second = open_source(trained("plain").path), open_source(trained("tp2pp2").path)
    to_checkpoint(AverageSource([first, second, second]), tmp_path / "out", report=ProgressBar())
    for name, value in full_tensors(tmp_path / "out").items():
        mean = (first.full_tensor(name).double() + 2 * second.full_tensor(name).double()) / 3
        assert torch.equal(value, mean.float())


def test_average_of_different_models_is_refused(trained: Get) -> None:
    sources = [open_source(trained(kind).path) for kind in ("plain", "zero3")]
    with pytest.raises(CheckpointError, match="of different models: model.hierarchy"):
        AverageSource(sources)


class Hostile:
    """Creates a file when it is unpickled without restrictions."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def plant_universal(file: str) -> Callable[[Path, TrainedCheckpoint, Hostile], Path]:
    def plant(folder: Path, trained: TrainedCheckpoint, hostile: Hostile) -> Path:
        out = folder / "universal"
        assert main(["convert", "to-deepspeed", str(trained.path), str(out)]) == 0
        (path,) = sorted(out.glob(f"*/{file}"))[:1]
        torch.save({"param": torch.zeros(3), "other": hostile}, path)
        return out

    return plant


def plant_bin(folder: Path, trained: TrainedCheckpoint, hostile: Hostile) -> Path:
    torch.save({"head.linear.bias": hostile}, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def plant_raw_pickle(folder: Path, trained: TrainedCheckpoint, hostile: Hostile) -> Path:
    """Write a bare pickle instead of torch's zip archive."""
    (folder / "model.pt").write_bytes(pickle.dumps(hostile))
    return folder / "model.pt"


def plant_old_torch_file(folder: Path, trained: TrainedCheckpoint, hostile: Hostile) -> Path:
    path = folder / "old.bin"
    torch.save({"a": hostile}, path, _use_new_zipfile_serialization=False)
    return path


def plant_sharded_bin(folder: Path, trained: TrainedCheckpoint, hostile: Hostile) -> Path:
    torch.save({"head.linear.bias": hostile}, folder / "pytorch_model-00001-of-00001.bin")
    (folder / "pytorch_model.bin.index.json").write_text(
        '{"weight_map": {"head.linear.bias": "pytorch_model-00001-of-00001.bin"}}'
    )
    return folder


def plant_safetensors(folder: Path, trained: TrainedCheckpoint, hostile: Hostile) -> Path:
    torch.save({"a": hostile}, folder / "model.safetensors")
    return folder / "model.safetensors"


def plant_golden(folder: Path, trained: TrainedCheckpoint, hostile: Hostile) -> Path:
    np.savez(folder / "golden.npz", config=np.array([hostile], dtype=object))
    return folder / "golden.npz"


def plant_checkpoint(folder: Path, trained: TrainedCheckpoint, hostile: Hostile) -> Path:
    out = Path(shutil.copytree(trained.path, folder / "checkpoint"))
    torch.save({"a": hostile}, out / "manifest.json")
    return out


PLANTS = {
    "fp32.pt": (plant_universal("zero/head.linear.bias/fp32.pt"), "refused, nothing was executed"),
    "exp_avg.pt": (
        plant_universal("zero/head.linear.bias/exp_avg.pt"),
        r"refused, nothing was executed: it refers to \w+.system"),
    "exp_avg_sq.pt": (plant_universal("zero/head.linear.bias/exp_avg_sq.pt"), "refused"),
    "step.pt": (plant_universal("zero/position_bias.u/step.pt"), "refused"),
    "model states": (plant_universal("mp_rank_00_model_states.pt"), "refused"),
    "state dict": (plant_bin, "refused, nothing was executed"),
    "state dict in parts": (plant_sharded_bin, "refused"),
    "bare pickle": (plant_raw_pickle, "model.pt: (refused|cannot be read)"),
    "old torch file": (plant_old_torch_file, "old.bin: (refused|cannot be read)"),
    "safetensors": (plant_safetensors, "cannot be read"),
    "golden file": (plant_golden, "without pickles"),
    "checkpoint": (plant_checkpoint, "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLANTS)
def test_planted_pickle_is_not_executed(
    trained: Get, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    plant, message = PLANTS[kind]
    mark, out = tmp_path / "mark", tmp_path / "out"
    (tmp_path / "in").mkdir()
    path = plant(tmp_path / "in", trained("plain"), Hostile(mark))
    config = tmp_path / "config.json"
    config.write_text(json.dumps(trained("plain").tree))
    capsys.readouterr()
    assert main(["convert", "from-deepspeed", str(path), str(out), "--config", str(config)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert re.search(message, line), line
    assert not mark.exists()
    assert not out.exists()


def test_planted_pickle_is_executed_by_an_unrestricted_load(tmp_path: Path) -> None:
    """The plants of the test above are real: torch.load without `weights_only` executes them."""
    torch.save({"a": Hostile(tmp_path / "mark")}, tmp_path / "file.bin")
    torch.load(tmp_path / "file.bin", weights_only=False)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(("kind", "value"), [("fp32", float("nan")), ("exp_avg_sq", -1.0)])
def test_weights_that_training_never_produces_are_refused_unless_asked_for(
    trained: Get, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, value: float
) -> None:
    source, out = tmp_path / "universal", tmp_path / "out"
    assert main(["convert", "to-deepspeed", str(trained("plain").path), str(source)]) == 0
    (file,) = source.glob(f"*/zero/head.linear.bias/{kind}.pt")
    torch.save({"param": torch.full_like(torch.load(file)["param"], value)}, file)
    command = ["convert", "from-deepspeed", str(source), str(out)]
    assert main(command) == 2
    assert f"{kind} of head.linear.bias: " in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--allow-non-finite"]) == 0
    assert main(["convert", "verify", str(out)]) == 1  # it is written, and still reported
