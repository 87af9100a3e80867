"""`hg_scale/train.py` as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = sys.executable

TINY = {
    "model": {
        "hierarchy": "1@1 1@2 1@1",
        "d_model": 32,
        "heads": 2,
        "d_ff": 64,
        "vocab_size": 257,
        "sequence_length": 32,
        "pooling": "average",
        "upsampling": "repeat",
    },
    "training": {"steps": 6, "global_batch_size": 4, "precision": "fp32", "validation_windows": 8},
    "logging": {"every": 1},
}


def train(
    *arguments: str, environment: dict[str, str] | None = None, launcher: tuple[str, ...] = ()
):  # type: ignore[no-untyped-def]
    command = [*(launcher or (PYTHON,)), str(ROOT / "hg_scale" / "train.py"), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )


def records(run: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of documents, prepared by the script."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        text = f"document {number} says: " + "the quick brown fox jumps over the lazy dog. " * 40
        (folder / f"{number:02}.txt").write_text(text)
    output = folder.parent / "shards"
    script = ROOT / "data_prep" / "prepare_bytes.py"
    command = [PYTHON, str(script), "--input", str(folder), "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return output


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({**TINY, "data": {"path": str(corpus)}}))
    return path


def test_a_dry_run_imports_no_torch() -> None:
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


def test_a_faulty_configuration_exits_with_2_and_lists_all_faults(config: Path) -> None:
    done = train("--config", str(config), "--set", "model.heads=3", "--set", "model.widht=1")
    assert done.returncode == 2
    assert "model.heads = 3" in done.stderr
    assert "model.widht" in done.stderr
    assert "Traceback" not in done.stderr


def test_under_a_launcher_only_the_first_rank_speaks(config: Path) -> None:
    faulty = ("--config", str(config), "--set", "model.heads=3")
    for rank, heard in ((0, True), (1, False)):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        done = train(*faulty, environment=place)
        assert done.returncode == 2
        assert ("model.heads" in done.stderr) == heard


def test_missing_data_is_told_in_one_line(config: Path, tmp_path: Path) -> None:
    missing = f"data.path={tmp_path / 'nowhere'}"
    done = train("--config", str(config), "--set", missing, "--run", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "data.path" in done.stderr and "prepare_bytes.py" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_two_processes_under_deepspeed_stop_and_resume(config: Path, tmp_path: Path) -> None:
    """The launcher's `--local_rank` is accepted; the resumed curve is that of one process."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    launcher = (str(Path(PYTHON).parent / "deepspeed"), "--num_gpus", "2")
    launcher += ("--master_port", str(20000 + os.getpid() % 20000))
    common = ("--config", str(config), "--set", "checkpoint.every=2")
    first = train(*common, "--run", str(run), "--stop-at", "3", launcher=launcher)
    assert first.returncode == 0, first.stdout + first.stderr
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-00000003"
    second = train(*common, "--run", str(run), launcher=launcher)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "resumed at step 3" in second.stdout
    third = train(*common, "--run", str(alone))
    assert third.returncode == 0, third.stdout + third.stderr
    curve = [(r["step"], r["loss"], r["grad_norm"]) for r in records(run) if "loss" in r]
    expected = [(r["step"], r["loss"], r["grad_norm"]) for r in records(alone) if "loss" in r]
    assert [row[0] for row in curve] == [1, 2, 3, 4, 5, 6]
    for here, there in zip(curve, expected, strict=True):
        assert here == pytest.approx(there, rel=1e-4)
    keys = {"tokens", "tokens_per_second", "mfu", "learning_rate", "bits_per_byte", "data_seconds"}
    assert keys <= records(run)[0].keys()
    held_out = [r for r in records(run) if "validation_bits_per_byte" in r]
    assert held_out[-1]["step"] == 6
    resolved = json.loads((run / "config.json").read_text())
    assert resolved["checkpoint"]["every"] == 2

    other = train(*common, "--run", str(run), "--set", "model.d_ff=128")
    assert other.returncode == 2
    assert "model.d_ff" in other.stderr and "checkpoint" in other.stderr
