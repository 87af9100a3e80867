"""A run of hg_scale 0.1 (commit ecf4b43) is read and resumed.

`version_0_1/` is its run folder: the configuration, the checkpoint of step 4, written by 2
data-parallel ranks with ZeRO 1, and in `curve.json` (step, loss, gradient norm) of all 8 steps of
the uninterrupted run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hg_scale.checkpoint.find import find_latest, verify_checksums
from hg_scale.checkpoint.manifest import read_manifest
from tests.runs import curve, train_in
from tests.shared import ROOT
from tests.world import Worlds

RUN = Path(__file__).parent / "version_0_1"
STEP, STEPS = 4, 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus of that run; its checkpoint contains the hash of the corpus."""
    folder = tmp_path_factory.mktemp("version_0_1")
    text = b"".join(b"%d bottles of beer on the wall.\n" % n for n in range(400))
    (folder / "text").write_bytes(text)
    script = ROOT / "data_prep" / "prepare_bytes.py"
    options = ["--input", "text", "--output", "corpus", "--split", "12000,500,300"]
    command = [sys.executable, str(script), *options]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    return folder / "corpus"


def test_checkpoint_is_found_and_verified() -> None:
    checkpoint = find_latest(RUN / "checkpoints")
    assert checkpoint == RUN / "checkpoints" / "step-00000004"
    manifest = read_manifest(checkpoint)
    assert (manifest["step"], manifest["optimizer_step"]) == (STEP, STEP)
    assert manifest["layout"] == {"tensor": 1, "pipeline": 1, "data": 2, "zero_stage": 1}
    assert verify_checksums(checkpoint) is None


@pytest.mark.parametrize(
    ("world_size", "settings"), [(1, ()), (2, ()), (2, ("parallel.tensor=2",))]
)
def test_resumed_run_has_the_curve_of_the_uninterrupted_run(
    worlds: Worlds, corpus: Path, tmp_path: Path, world_size: int, settings: tuple[str, ...]
) -> None:
    run = Path(shutil.copytree(RUN, tmp_path / "run"))
    overrides = [v for setting in (f"data.path={corpus}", *settings) for v in ("--set", setting)]
    arguments = ["--config", str(run / "config.json"), "--run", str(run), *overrides]
    finished = train_in(worlds, world_size, tmp_path, *arguments)
    assert finished.code == 0
    assert f"resumed at step {STEP} from {run}" in finished.output
    expected = [tuple(line) for line in json.loads((RUN / "curve.json").read_text())]
    resumed = curve(run)
    assert [step for step, *_ in resumed] == list(range(STEP + 1, STEPS + 1))
    np.testing.assert_allclose(resumed, expected[STEP:], rtol=1e-5)
