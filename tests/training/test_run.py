"""Runs on real shards, from command-line arguments to the files of the run folder."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tests.runs import Finished, arguments, curve, records, run_train, train_in
from tests.world import Worlds

Start = Callable[..., Finished]


@pytest.fixture
def start(worlds: Worlds, config: Path, tmp_path: Path) -> Start:
    """`start(size, run, key=value, ...)` trains on `size` ranks into `tmp_path / run`."""

    def start(size: int, run: str, *sets: str, options: tuple[str, ...] = ()) -> Finished:
        command_line = arguments(config, tmp_path / run, *sets)
        return train_in(worlds, size, tmp_path, *command_line, *options)

    return start


def test_overrides_of_every_kind_reach_the_run(start: Start, tmp_path: Path) -> None:
    """Lists, nested lists, booleans, null, numbers, strings with spaces, expert keys."""
    sets = {
        "model.d_model": [32, 48],
        "model.window": [8, None],
        "model.shorten_factor_choices": [[1, 2]],
        "model.bias": False,
        "model.norm": "rmsnorm",
        "model.dropout": 0.1,
        "optimizer.betas": [0.9, 0.98],
        "training.activation_checkpointing": [False, True],
        "training.validation_windows": 2,
        "logging.wandb_project": None,
        "deepspeed.zero_optimization.reduce_bucket_size": 10_000,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in sets.items()]
    overrides[4] = "model.norm=rmsnorm"  # a bare word is a string
    done = start(1, "run", *overrides, "notes=two words, a = b", options=("--stop-at", "2"))
    assert done.code == 0, done.output
    resolved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert resolved["notes"] == "two words, a = b"
    for key, value in sets.items():
        node: Any = resolved
        for part in key.split("."):
            node = node[part]
        assert node == value, key
    assert [step for step, _, _ in curve(tmp_path / "run")] == [1, 2]


def test_a_step_is_profiled_on_every_rank(start: Start, tmp_path: Path) -> None:
    done = start(2, "run", options=("--profile", "3", "--stop-at", "4"))
    assert done.code == 0, done.output
    folder = tmp_path / "run" / "profile"
    for rank in (0, 1):
        stem = f"step-3-rank-{rank}"
        with gzip.open(folder / f"{stem}.trace.json.gz", "rt") as file:
            names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
        assert "aten::scaled_dot_product_attention" in names or "aten::bmm" in names
        assert any("gloo" in name for name in names)  # the reduction of gradients
        assert "aten::" in (folder / f"{stem}.txt").read_text()
        if torch.cuda.is_available():
            assert (folder / f"{stem}.memory.pickle").stat().st_size
    assert len(list(folder.glob("*.trace.json.gz"))) == 2

    done = start(2, "run", options=("--profile", "3"))
    assert done.code == 0 and "no profile: step 3 is not among 5 to 6" in done.output


BROKEN_WANDB = """
import os
from types import SimpleNamespace

def fails_at(call):
    def method(*_, **__):
        if os.environ["BROKEN"] == call:
            raise RuntimeError(f"cannot {call}")
    return method

fails_at("import")()
Settings = dict
run = SimpleNamespace(log=fails_at("log"), finish=fails_at("finish"))
init = lambda **_: fails_at("init")() or run
teardown = lambda: None
"""
BROKEN_SETTINGS = """
from types import SimpleNamespace
from wandb import fails_at

def singleton():
    fails_at("settings")()
    return SimpleNamespace(settings=SimpleNamespace(mode="offline"))
"""


def train_with_broken_wandb(folder: Path, call: str, command_line: list[str], output: Path) -> int:
    """Train with a package wandb in `folder` of which the call fails."""
    (folder / "wandb" / "sdk").mkdir(parents=True)
    (folder / "wandb" / "__init__.py").write_text(BROKEN_WANDB)
    (folder / "wandb" / "sdk" / "__init__.py").touch()
    (folder / "wandb" / "sdk" / "wandb_setup.py").write_text(BROKEN_SETTINGS)
    with mock.patch.dict(os.environ, {"PYTHONPATH": str(folder), "BROKEN": call}):
        return run_train(command_line, output)


@pytest.mark.parametrize("call", ["import", "settings", "init", "log", "finish"])
def test_an_error_in_wandb_does_not_end_the_run(
    worlds: Worlds, config: Path, tmp_path: Path, call: str
) -> None:
    command_line = arguments(config, tmp_path / "run", "logging.wandb_project=hg")
    output = tmp_path / "terminal"
    assert worlds.run(1, train_with_broken_wandb, tmp_path, call, command_line, output) == [0]
    text = output.with_name("terminal-0").read_text()
    assert text.count(f"warning (rank 0): wandb disabled: cannot {call}\n") == 1, text
    assert text.count(": wandb") == 1
    assert "step 6 of 6 saved" in text and "Traceback" not in text
    assert [step for step, _, _ in curve(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


WSD = ("schedule.kind=wsd", "schedule.warmup_steps=2", "optimizer.learning_rate=0.002")


def test_a_decay_can_start_from_a_checkpoint_of_another_run(start: Start, tmp_path: Path) -> None:
    """Weights, optimizer, step and data continue: as a run that had this schedule from step 1."""
    trunk = (*WSD, "training.steps=12", "schedule.decay_steps=3", "checkpoint.every=3")
    branch = (*WSD, "training.steps=10", "schedule.decay_steps=4")
    source = tmp_path / "trunk" / "checkpoints" / "step-00000006"
    assert start(1, "trunk", *trunk).code == 0
    assert start(1, "direct", *branch).code == 0
    start_from = f"checkpoint.start_from={source}"
    done = start(1, "branch", *branch, start_from, options=("--stop-at", "8"))
    assert done.code == 0 and f"resumed at step 6 from {source}" in done.output
    done = start(1, "branch", *branch, start_from)  # resumes from its own checkpoint
    own = tmp_path / "branch" / "checkpoints" / "step-00000008"
    assert done.code == 0 and str(own) in done.output

    curves = {name: curve(tmp_path / name) for name in ("trunk", "direct", "branch")}
    assert curves["direct"][:6] == curves["trunk"][:6]  # the same schedule until there
    assert [step for step, _, _ in curves["branch"]] == [7, 8, 9, 10]
    assert curves["branch"] == curves["direct"][6:]  # bit for bit
    assert curves["branch"][0][1:] == curves["trunk"][6][1:]  # step 7, before its update
    assert curves["branch"][1:] != curves["trunk"][7:10]
    steps = [r for r in records(tmp_path / "branch") if "loss" in r]
    rates = [r["learning_rate"] for r in steps]
    assert rates == pytest.approx([0.002 * fraction for fraction in (0.75, 0.5, 0.25, 0.0)])
    assert [r["tokens"] for r in steps] == [4 * 32 * step for step in (7, 8, 9, 10)]
    trunk_rates = [r["learning_rate"] for r in records(tmp_path / "trunk") if "loss" in r]
    assert trunk_rates[:9] == pytest.approx([0.001, *[0.002] * 8])


def test_start_from_a_folder_that_is_no_checkpoint(start: Start, tmp_path: Path) -> None:
    done = start(1, "run", f"checkpoint.start_from={tmp_path}")
    assert done.code == 2
    assert "checkpoint.start_from = " in done.output and "not a complete checkpoint" in done.output
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_with_incomplete_checkpoints_does_not_start_from_scratch(
    start: Start, config: Path, tmp_path: Path
) -> None:
    """It resumes from the newest complete one; without one it ends and changes no file."""
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    assert start(1, "run", "checkpoint.every=2", options=("--stop-at", "4")).code == 0
    before = (run / "metrics.jsonl").read_text()
    newest, oldest = checkpoints / "step-00000004", checkpoints / "step-00000002"
    (newest / "rank-00000.safetensors").unlink()
    shutil.copytree(run, tmp_path / "copy")
    done = start(1, "copy")
    assert done.code == 0, done.output
    assert "skipping" in done.output and "resumed at step 2" in done.output

    (oldest / "manifest.json").write_text("{")
    done = start(1, "run")
    assert done.code == 1
    (line,) = done.output.splitlines()
    assert line.startswith(f"{checkpoints}: none of the checkpoints is complete (the newest, ")
    assert "step-00000004: rank-00000.safetensors is missing" in line
    assert "another run folder" in line
    assert (run / "metrics.jsonl").read_text() == before
    assert sorted(p.name for p in checkpoints.iterdir()) == ["latest", oldest.name, newest.name]

    assert start(2, "run").output == done.output  # reported by one rank only


def test_a_checkpoint_that_one_rank_does_not_see(
    start: Start, worlds: Worlds, config: Path, tmp_path: Path
) -> None:
    """As with node-local run folders: no rank starts from scratch while others resume."""
    assert start(2, "run", options=("--stop-at", "2")).code == 0
    command_line, output = arguments(config, Path("run")), tmp_path / "separate"
    codes = worlds.run(2, train_in_folder, command_line, output, [tmp_path, tmp_path / "other"])
    assert codes == [1, 1]
    (line,) = "".join(Path(f"{output}-{rank}").read_text() for rank in (0, 1)).splitlines()
    assert line.startswith("rank 1 does not see the checkpoint run/checkpoints/step-")
    assert "share" in line


def train_in_folder(command_line: list[str], output: Path, folders: list[Path]) -> int:
    """`run_train` with the current folder `folders[rank]`."""
    previous, folder = Path.cwd(), folders[int(os.environ["RANK"])]
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    try:
        return run_train(command_line, output)
    finally:
        os.chdir(previous)


def train_and_count(command_line: list[str], output: Path) -> tuple[int, int, int]:
    """Train; the exit code, and how often this rank opened the training and validation data."""
    from hg_scale.training import batch_loader, validation

    stream = mock.patch.object(batch_loader, "TrainingStream", wraps=batch_loader.TrainingStream)
    windows = mock.patch.object(
        validation, "evaluation_batches", wraps=validation.evaluation_batches
    )
    with stream as trained, windows as validated:
        code = run_train(command_line, output)
    return code, trained.call_count, validated.call_count


def test_only_first_and_last_stage_read_data(
    worlds: Worlds, start: Start, config: Path, tmp_path: Path
) -> None:
    """Four stages in bf16, one of them on the shortened level only; same curve as one process."""
    sets = ("model.hierarchy=1@1 2@2 1@1", "training.precision=bf16", "training.validate_every=3")
    assert start(1, "single", *sets).code == 0
    command_line = arguments(config, tmp_path / "stages", *sets, "parallel.pipeline=4")
    ranks = worlds.run(4, train_and_count, command_line, tmp_path / "stages-terminal")
    assert ranks == [(0, 1, 2), (0, 0, 0), (0, 0, 0), (0, 1, 2)]
    np.testing.assert_allclose(curve(tmp_path / "stages"), curve(tmp_path / "single"), rtol=1e-2)
    key = "validation_bits_per_byte"
    validations = [
        [r[key] for r in records(tmp_path / name) if key in r] for name in ("stages", "single")
    ]
    assert len(validations[0]) == 2
    np.testing.assert_allclose(*validations, rtol=1e-2)


def test_a_run_tells_of_bad_steps_and_of_its_end_and_keeps_its_starts(
    start: Start, tmp_path: Path
) -> None:
    """From two ranks each event comes once; a run that gives up says so."""
    heard = tmp_path / "heard"
    told = f"logging.on_event=cat >> {heard}; echo >> {heard}"
    assert start(2, "run", told, options=("--stop-at", "2")).code == 0
    spikes = (
        "optimizer.learning_rate=10",
        "guard.spike_sigma=1",
        "guard.window=4",
        "guard.max_skipped=0",
    )
    assert start(2, "run", told, "logging.norms_every=2", *spikes).code == 77
    events = [json.loads(line) for line in heard.read_text().splitlines()]
    assert (events[0]["event"], events[0]["step"], events[0]["exit_code"]) == ("end", 2, 0)
    assert events[0]["reason"] == "step 2 of 6 saved"
    later = sorted((e["event"], e["step"], e["exit_code"]) for e in events[1:])
    assert later == [("bad_step", later[0][1], None), ("give_up", later[0][1], 77)]
    starts = [json.loads(line) for line in (tmp_path / "run/starts.jsonl").read_text().splitlines()]
    assert [(s["start"], s["step"], s["ranks"], s["last_step"]) for s in starts] == [
        (1, 0, 2, None), (2, 2, 2, 2),
    ]  # fmt: skip
    lines = records(tmp_path / "run")
    assert {line["step"] > 2: line["start"] for line in lines} == {False: 1, True: 2}
    assert "cat >>" not in (tmp_path / "run" / "config.json").read_text()
