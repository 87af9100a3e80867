"""`hg-scale plan`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hg_scale.commands.main import main
from hg_scale.config import load_config
from hg_scale.model.costs import training_flops_per_token
from tests.shared import ROOT

QUICKSTART = ROOT / "configs" / "quickstart.json"


def test_the_written_control_loads_and_has_equal_flops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "flat.json"
    assert main(["plan", "--flat-control", str(QUICKSTART), "--write", str(target)]) == 0
    output = capsys.readouterr().out
    flat, hourglass = load_config(target), load_config(QUICKSTART)
    assert not flat.model.parsed.shortenings
    flops = training_flops_per_token(flat.model)
    assert flops == pytest.approx(training_flops_per_token(hourglass.model), rel=0.01)
    assert output.startswith(f"{flops:.4g} training FLOPs per token")
    assert f"written: {target}" in output
    model = json.loads(target.read_text())["model"]
    assert f"{model['hierarchy'].removesuffix('@1')} layers of width {model['d_model']}" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([ROOT / "configs" / "flat_1b.json"], "model.hierarchy = '12@1': is flat already"),
        ([ROOT / "configs" / "none.json"], "none.json"),
        ([QUICKSTART, "--set", "model.heads=7"], "model.heads"),
        ([QUICKSTART, "--set", "training.steps=5", "--write", "x.json"], "lacks the values of"),
        ([QUICKSTART, "--write", "/proc/no/x.json"], "/proc/no"),
    ],
)
def test_mistakes_are_reported(
    arguments: list[object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--flat-control", *map(str, arguments)]) == 2
    assert message in capsys.readouterr().err


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; from hg_scale.commands.main import main; "
        f"code = main(['plan', '--flat-control', {str(QUICKSTART)!r}]); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
