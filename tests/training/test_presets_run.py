"""One step of a preset at full width, and some steps on enwik8."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hg_scale.config import load_config
from tests.runs import records, train
from tests.shared import ROOT, shared
from tests.training.models import run_layout
from tests.world import Worlds


def test_one_step_of_hg_1b_bytes_at_full_width(worlds: Worlds) -> None:
    """One block per level, length 768: the initial loss is near that of a uniform guess."""
    overrides = ["model.hierarchy=1@1 1@3 1@6 1@3 1@1", "model.sequence_length=768",
                 "training.global_batch_size=1", "model.vocab_size=257"]  # fmt: skip
    config = load_config(ROOT / "configs" / "hg_1b_bytes.json", overrides)
    tree: dict[str, Any] = config.model_dump()
    result = worlds.run(1, run_layout, tree, 1)[0]
    assert result["loss"][0] == pytest.approx(math.log(257), abs=1.0)
    assert 0 < result["grad_norm"][0] < 1000
    assert result["validation"][0] < result["loss"][0] + 5


def test_the_loss_falls_on_enwik8(tmp_path: Path) -> None:
    """With the benchmark's standard split, prepared by `prepare_bytes.py`."""
    packed = shared("data/enwik8.xz")
    shards, run = tmp_path / "enwik8", tmp_path / "run"
    command = [sys.executable, "data_prep/prepare_bytes.py", "--input", str(packed)]
    command += ["--output", str(shards), "--split", "90000000,5000000,5000000"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, timeout=240)
    done = train(
        "--config", "configs/quickstart.json", "--run", str(run), "--stop-at", "12",
        "--set", f"data.path={shards}", "--set", "logging.every=1",
        "--set", "model.vocab_size=256", "--set", "training.validation_windows=8",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    curve = [record["bits_per_byte"] for record in records(run) if "loss" in record]
    assert curve[0] == pytest.approx(8, abs=1.5)
    assert curve[-1] < curve[0] - 2
