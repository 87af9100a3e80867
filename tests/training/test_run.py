"""Whole runs on real shards, from the command line's arguments to the files of the run folder."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tests.runs import Finished, curve, records, run_train, train_in
from tests.world import Worlds

Start = Callable[..., Finished]


@pytest.fixture
def start(worlds: Worlds, config: Path, tmp_path: Path) -> Start:
    """`start(size, run, key=value, ...)` trains in a world of `size` into `tmp_path / run`."""

    def start(size: int, run: str, *sets: str, options: tuple[str, ...] = ()) -> Finished:
        return train_in(worlds, size, tmp_path, *arguments(config, tmp_path / run, sets), *options)

    return start


def arguments(config: Path, run: Path, sets: tuple[str, ...]) -> list[str]:
    overrides = [word for key in sets for word in ("--set", key)]
    return ["--config", str(config), "--run", str(run), *overrides]


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
    words = [f"{key}={json.dumps(value)}" for key, value in sets.items()]
    words[4] = "model.norm=rmsnorm"  # a bare word is a string
    done = start(1, "run", *words, "notes=two words, a = b", options=("--stop-at", "2"))
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
        assert any("gloo" in name for name in names)  # the gradients' reduction is in it
        assert "aten::" in (folder / f"{stem}.txt").read_text()
        if torch.cuda.is_available():
            assert (folder / f"{stem}.memory.pickle").stat().st_size
    assert len(list(folder.glob("*.trace.json.gz"))) == 2

    done = start(2, "run", options=("--profile", "3"))
    assert done.code == 0 and "no profile: step 3 is not among 5 to 6" in done.output


def wandb_that(fault: str) -> Any:
    """A wandb that fails to be imported, to start, to log, or to finish."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"cannot {fault}")

    def do(what: str) -> Callable[..., Any]:
        return fail if what == fault else lambda *_, **__: None

    run = SimpleNamespace(log=do("log"), finish=do("finish"))
    init = fail if fault == "init" else lambda **_: run
    return SimpleNamespace(init=init, Settings=dict) if fault != "import" else None


def train_with_wandb(fault: str, words: list[str], output: Path) -> int:
    with mock.patch.dict(sys.modules, {"wandb": wandb_that(fault)}):
        return run_train(words, output)


@pytest.mark.parametrize("fault", ["import", "init", "log", "finish"])
def test_a_wandb_that_raises_never_ends_the_run(
    worlds: Worlds, config: Path, tmp_path: Path, fault: str
) -> None:
    words = arguments(config, tmp_path / "run", ("logging.wandb_project=hg",))
    output = tmp_path / "terminal"
    assert worlds.run(1, train_with_wandb, fault, words, output) == [0]
    told = output.with_name("terminal-0").read_text()
    assert told.count("warning (rank 0): wandb disabled: ") == 1, told
    assert "step 6 of 6 saved" in told and "Traceback" not in told
    assert [step for step, _, _ in curve(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


WSD = ("schedule.kind=wsd", "schedule.warmup_steps=2", "optimizer.learning_rate=0.002")


def test_a_decay_branches_off_a_checkpoint(start: Start, tmp_path: Path) -> None:
    """Weights, optimizer, step and data go on: it is the run that had this schedule all along."""
    trunk = (*WSD, "training.steps=12", "schedule.decay_steps=3", "checkpoint.every=3")
    branch = (*WSD, "training.steps=10", "schedule.decay_steps=4")
    source = tmp_path / "trunk" / "checkpoints" / "step-00000006"
    assert start(1, "trunk", *trunk).code == 0
    assert start(1, "direct", *branch).code == 0
    off = f"checkpoint.start_from={source}"
    done = start(1, "branch", *branch, off, options=("--stop-at", "8"))
    assert done.code == 0 and f"resumed at step 6 from {source}" in done.output
    done = start(1, "branch", *branch, off)  # goes on from its own checkpoint
    assert (
        done.code == 0 and f"{tmp_path / 'branch' / 'checkpoints' / 'step-00000008'}" in done.output
    )

    curves = {name: curve(tmp_path / name) for name in ("trunk", "direct", "branch")}
    assert curves["direct"][:6] == curves["trunk"][:6]  # undisturbed until the branch
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


def test_a_branch_off_what_is_no_checkpoint(start: Start, tmp_path: Path) -> None:
    done = start(1, "run", f"checkpoint.start_from={tmp_path}")
    assert done.code == 2
    assert "checkpoint.start_from = " in done.output and "not a whole checkpoint" in done.output
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_damaged_checkpoints_do_not_begin_the_run_anew(
    start: Start, config: Path, tmp_path: Path
) -> None:
    """The newest whole one is taken; where none is, nothing is trained and nothing is touched."""
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    assert start(1, "run", "checkpoint.every=2", options=("--stop-at", "4")).code == 0
    before = (run / "metrics.jsonl").read_text()
    newest, oldest = checkpoints / "step-00000004", checkpoints / "step-00000002"
    (newest / "rank-00000.safetensors").unlink()
    shutil.copytree(run, tmp_path / "copy")
    done = start(1, "copy")
    assert done.code == 0, done.output
    assert "passing over" in done.output and "resumed at step 2" in done.output

    (oldest / "manifest.json").write_text("{")
    done = start(1, "run")
    assert done.code == 1
    (line,) = done.output.splitlines()
    assert line.startswith(f"{checkpoints}: none of the checkpoints here is whole (the newest, ")
    assert "step-00000004: rank-00000.safetensors is missing" in line
    assert "another run folder" in line
    assert (run / "metrics.jsonl").read_text() == before
    assert sorted(p.name for p in checkpoints.iterdir()) == ["latest", oldest.name, newest.name]

    assert start(2, "run").output == done.output  # one rank tells


def test_a_checkpoint_that_one_rank_does_not_see(
    start: Start, worlds: Worlds, config: Path, tmp_path: Path
) -> None:
    """As with run folders that are a node's own: no rank begins anew beside others that go on."""
    assert start(2, "run", options=("--stop-at", "2")).code == 0
    words = arguments(config, Path("run"), ())
    output = tmp_path / "apart"
    codes = worlds.run(2, train_in_folder, words, output, [tmp_path, tmp_path / "other"])
    assert codes == [1, 1]
    told = "".join(Path(f"{output}-{rank}").read_text() for rank in (0, 1))
    (line,) = told.splitlines()
    assert line.startswith("rank 1 does not see the first rank's checkpoint run/checkpoints/step-")
    assert "share" in line


def train_in_folder(words: list[str], output: Path, folders: list[Path]) -> int:
    """`run_train` with a folder of its own as the current one."""
    before, folder = Path.cwd(), folders[int(os.environ["RANK"])]
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    try:
        return run_train(words, output)
    finally:
        os.chdir(before)


def train_and_count(words: list[str], output: Path) -> tuple[int, int, int]:
    """The exit code, and how often this rank opened the training and the validation data."""
    from hg_scale.training import batch_loader, validation

    stream = mock.patch.object(batch_loader, "TrainingStream", wraps=batch_loader.TrainingStream)
    windows = mock.patch.object(
        validation, "evaluation_windows", wraps=validation.evaluation_windows
    )
    with stream as trained, windows as validated:
        code = run_train(words, output)
    return code, trained.call_count, validated.call_count


def test_stages_in_the_middle_read_nothing(
    worlds: Worlds, start: Start, config: Path, tmp_path: Path
) -> None:
    """Four stages in bf16, one of them inside the valley: same curve, only the ends read."""
    sets = ("model.hierarchy=1@1 2@2 1@1", "training.precision=bf16", "training.validate_every=3")
    assert start(1, "alone", *sets).code == 0
    words = arguments(config, tmp_path / "stages", (*sets, "parallel.pipeline=4"))
    ranks = worlds.run(4, train_and_count, words, tmp_path / "stages-terminal")
    assert ranks == [(0, 1, 2), (0, 0, 0), (0, 0, 0), (0, 1, 2)]
    here, there = curve(tmp_path / "stages"), curve(tmp_path / "alone")
    np.testing.assert_allclose(here, there, rtol=1e-2)
    key = "validation_bits_per_byte"
    validations = [
        [r[key] for r in records(tmp_path / name) if key in r] for name in ("stages", "alone")
    ]
    assert len(validations[0]) == 2
    np.testing.assert_allclose(*validations, rtol=1e-2)
