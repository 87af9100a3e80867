"""`hg_scale/train.py` as a user runs it, plain and under every launcher."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hg_scale.commands.main import main
from hg_scale.train import add_options, run
from tests.ports import free_port
from tests.runs import curve, records, train, train_in
from tests.shared import ROOT
from tests.world import Worlds

PYTHON = sys.executable


def test_dry_run_imports_no_torch() -> None:
    script = (
        "import runpy, sys\n"
        "sys.argv = ['train.py', '--config', 'configs/hg_1b_bytes.json', '--dry-run']\n"
        "try:\n    runpy.run_path('hg_scale/train.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'deepspeed', 'megatron'} & sys.modules.keys()\n"
    )
    done = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for word in ("level1.stack.0", "parameters", "training FLOPs", "layout"):
        assert word in done.stdout


@pytest.mark.parametrize("name", ["x" * 256, "y/" * 2040 + "z", "loop/run"])
def test_a_run_folder_that_cannot_have_this_name_is_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], name: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    parser = argparse.ArgumentParser()
    add_options(parser)
    assert run(parser.parse_args(["--config", str(config), "--run", name])) == 2
    for verb in ("status", "report", "summary", "generate", "evaluate"):
        assert main([verb, name]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 and all(name[:100] in line for line in lines), lines


def test_invalid_configuration_exits_with_2_and_lists_all_errors(config: Path) -> None:
    done = train("--config", str(config), "--set", "model.heads=3", "--set", "model.widht=1")
    assert done.returncode == 2
    assert "model.heads = 3" in done.stderr
    assert "model.widht" in done.stderr
    assert "Traceback" not in done.stderr


def test_under_a_launcher_only_rank_0_reports(config: Path) -> None:
    arguments = ("--config", str(config), "--set", "model.heads=3")
    for rank, reports in ((0, True), (1, False)):
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        done = train(*arguments, environment=environment)
        assert done.returncode == 2
        assert ("model.heads" in done.stderr) == reports


def test_inconsistent_launcher_variables_are_an_error(config: Path) -> None:
    done = train("--config", str(config), environment={"RANK": "2", "WORLD_SIZE": "2"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("RANK=2: expected less than WORLD_SIZE=2")
    assert done.stderr.count("\n") == 1


def test_all_unusable_inputs_are_reported_before_anything_starts(
    config: Path, tmp_path: Path
) -> None:
    """Without torch, and without a run folder."""
    (tmp_path / "torch.py").write_text("raise SystemExit(33)")
    sources = [{"path": str(tmp_path)}, {"path": "pipe:never opened {}"}, {"path": "nowhere"}]
    sections = {"data": {"sources": sources}, "checkpoint": {"start_from": "no/run"}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **sections}))
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    run = tmp_path / "run"
    done = train("--config", str(config), "--run", str(run), environment=environment)
    assert (done.returncode, done.stdout) == (2, "")
    first, *lines = done.stderr.splitlines()
    assert first == "configuration: 3 problems"
    assert lines[0].startswith(f'  data.sources entry 1 = "{tmp_path}": {tmp_path}/index.json: no')
    assert lines[1].startswith('  data.sources entry 3 = "nowhere": no such folder; make it with')
    assert lines[2].startswith('  checkpoint.start_from = "no/run": not a complete checkpoint')
    assert len(lines) == 3 and not run.exists()


def test_dry_run_uses_the_layout_of_training(config: Path) -> None:
    sets = ("parallel.tensor=2", "training.global_batch_size=6", "parallel.elastic=true")
    overrides = [word for key in sets for word in ("--set", key)]
    done = train("--config", str(config), "--dry-run", "--world-size", "3", *overrides)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("parallel.elastic: continuing with 3 of 3 processes: --set ")
    assert "layout: 3 processes = tensor 1 x pipeline " in done.stdout
    done = train("--config", str(config), "--dry-run", "--world-size", "3", *overrides[:-2])
    assert done.returncode == 2


def test_missing_data_is_reported_in_one_line(config: Path, tmp_path: Path) -> None:
    missing = f"data.path={tmp_path / 'nowhere'}"
    done = train("--config", str(config), "--set", missing, "--run", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "data.path" in done.stderr and "prepare_bytes.py" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize("option", [["training.steps=5"], ["--training.steps", "5"]])
def test_other_ways_to_set_a_key_suggest_the_set_option(config: Path, option: list[str]) -> None:
    done = train("--config", str(config), *option)
    assert done.returncode == 2
    assert done.stderr.endswith("; did you mean --set training.steps=5?\n")


def test_file_as_data_path_is_an_error(config: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.touch()
    done = train("--config", str(config), "--set", f"data.path={text}")
    assert done.returncode == 2
    assert (
        f"a file; make a folder of it with data_prep/prepare_bytes.py --input {text}" in done.stderr
    )


def launchers() -> dict[str, tuple[str, ...]]:
    """Commands that start two processes, for the launchers installed with this Python."""
    folder = Path(PYTHON).parent
    known = {
        "torchrun": ("--nproc_per_node", "2", "--master_port", str(free_port()), "--"),
        "deepspeed": ("--num_gpus", "2", "--master_port", str(free_port())),
        "mpirun": ("-n", "2", "--allow-run-as-root", "--oversubscribe", PYTHON),
    }
    return {k: (str(folder / k), *words) for k, words in known.items() if (folder / k).exists()}


def test_error_is_reported_under_mpirun_although_rank_0_is_late(config: Path) -> None:
    """mpirun kills all ranks as soon as one has exited; here rank 0 is two seconds late."""
    if "mpirun" not in launchers():
        pytest.skip("mpirun is not installed")
    late = '[ "$OMPI_COMM_WORLD_RANK" != 0 ] || sleep 2; exec "$@"'
    *words, python = launchers()["mpirun"]
    launcher = (*words, "sh", "-c", late, "sh", python)
    done = train("--config", str(config), "--set", "model.heads=3", launcher=launcher)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("configuration: ") == 1, done.stdout + done.stderr


def test_every_launcher_resumes_the_run_of_another(
    worlds: Worlds, config: Path, tmp_path: Path
) -> None:
    """The curve of two processes, each launcher resuming from another, is that of one process.

    In wandb (offline) it is one run, with its configuration.
    """
    run, found = tmp_path / "run", launchers()
    assert {"deepspeed", "torchrun"} <= found.keys()
    common = ["--config", str(config), "--set", "checkpoint.every=2"]
    stops, before = [2, 4, 6] if "mpirun" in found else [2, 6], 0
    for (name, launcher), stop in zip(found.items(), stops, strict=True):
        options = ("--run", str(run), "--set", "logging.wandb_project=hg", "--stop-at", str(stop))
        done = train(*common, *options, launcher=launcher)
        assert done.returncode == 0, name + done.stdout + done.stderr
        assert (f"resumed at step {before} from" in done.stdout) == (before > 0), name
        assert (run / "checkpoints" / "latest").read_text() == f"step-{stop:08}\n"
        before = stop
    single = train_in(worlds, 1, tmp_path, *common, "--run", str(tmp_path / "single"))
    assert single.code == 0, single.output
    assert [step for step, _, _ in curve(run)] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(curve(run), curve(tmp_path / "single"), rtol=1e-4)
    identity = (run / "wandb_id").read_text().strip()
    files = list((run / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{identity}.wandb"}
    assert all(b"sequence_length" in file.read_bytes() for file in files)

    keys = {"tokens", "tokens_per_second", "mfu", "learning_rate", "bits_per_byte", "data_seconds"}
    assert keys <= records(run)[0].keys()
    held_out = [r for r in records(run) if "validation_bits_per_byte" in r]
    assert held_out[-1]["step"] == 6
    score = tmp_path / "score.json"
    options = ("--split", "validation", "--windows", "8", "--json", str(score))
    assert main(["evaluate", str(run), *options]) == 0
    bits = json.loads(score.read_text())["bits_per_byte"]
    assert bits == pytest.approx(held_out[-1]["validation_bits_per_byte"], rel=1e-5)
    resolved = json.loads((run / "config.json").read_text())
    assert resolved["checkpoint"]["every"] == 2

    other = train_in(worlds, 1, tmp_path, *common, "--run", str(run), "--set", "model.d_ff=128")
    assert other.code == 2
    assert "model.d_ff" in other.output and "checkpoint" in other.output
