"""A Slurm job runs from its configuration as it was at the first start."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from hg_scale.config import load_config
from hg_scale.parallel.launch import Launch
from hg_scale.train import add_options, use_job_config
from hg_scale.training.job_config import describe_changes, keep_config


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A configuration and the one that it extends."""
    base, config = tmp_path / "base.json", tmp_path / "c.json"
    base.write_text('{"optimizer": {"learning_rate": 0.001, "eps": 1e-9}, "notes": "base"}')
    config.write_text('{"extends": "base.json", "training": {"steps": 9}}')
    return base, config


def choose(config: Path, *words: str, rank: int = 0) -> Path:
    """The file that `train.py` loads."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    options = parser.parse_args(["--config", str(config), *words])
    return use_job_config(options, config.parent / "run", Launch(rank, 2, rank))


def test_a_copy_keeps_what_the_base_said(files: tuple[Path, Path], tmp_path: Path) -> None:
    base, config = files
    copy = tmp_path / "kept" / "c.json"
    keep_config(config, copy)
    assert describe_changes(copy, config, []) is None
    base.write_text('{"optimizer": {"learning_rate": 0.025}, "model": {"heads": 4}}')
    assert load_config(copy).optimizer.learning_rate == 0.001
    assert describe_changes(copy, config, ["training.steps=7", "optimizer.eps=1e-8"]) == (
        f"{config} has changed since the first start of this job, which continues without: "
        'optimizer.learning_rate 0.001 -> 0.025, notes "base" -> unset, model.heads unset -> 4; '
        "to use it, submit a new job, or with --reread-config"
    )
    line = describe_changes(copy, config, ["optimizer.learning_rate=0.1", "notes=x"])
    assert line and "learning_rate" not in line and "notes" not in line  # both are overridden
    base.unlink()
    line = describe_changes(copy, config, [])
    assert line and line.startswith(f"{config} cannot be read any more (no such file, which ")


def test_a_requeued_job_uses_its_copy(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, config = files
    assert choose(config) == config and not (config.parent / "run").exists()  # no job
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert choose(config, rank=1) == config and not (config.parent / "run").exists()
    assert choose(config) == config
    copy = config.parent / "run" / "code" / "7" / "config.json"
    base.write_text('{"optimizer": {"learning_rate": 0.025, "eps": 1e-9}, "notes": "base"}')
    assert choose(config) == config  # by hand, in an allocation
    assert json.loads(copy.read_text())["optimizer"]["learning_rate"] == 0.025
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    base.write_text("{}")
    assert choose(config) == copy and choose(config, rank=1) == copy
    output = capsys.readouterr().out
    assert output.count("\n") == 1 and "optimizer.learning_rate 0.025 -> unset" in output
    assert choose(config, "--reread-config", rank=1) == config


def test_the_check_keeps_the_configuration_for_the_ranks(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `slurm/common.sh` starts them."""
    base, config = files
    copy = tmp_path / "code" / "c.json"
    words = ("--resolved", str(copy))
    assert choose(config, *words) == config and not copy.exists()
    assert choose(config, *words, "--check") == config and copy.exists()
    base.write_text('{"optimizer": {"learning_rate": 0.025}}')
    assert choose(config, *words, "--check") == copy and choose(config, *words) == copy
    assert capsys.readouterr().out.count("optimizer.learning_rate 0.001 -> 0.025") == 1
    assert choose(config, *words, "--check", "--reread-config") == config
    assert choose(config, *words, "--reread-config") == copy
    assert load_config(copy).optimizer.learning_rate == 0.025
