"""`train.py --check`: problems that are found before a run starts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.manifest import CHECKPOINT_VERSION, seal
from hg_scale.config import ConfigError, load_config
from hg_scale.config.load import parse_config
from hg_scale.data.errors import DataError
from hg_scale.model.costs import parameter_count
from hg_scale.training.check import (
    DiskError,
    check_disk,
    check_inputs,
    check_run,
    checkpoints_to_come,
)
from hg_scale.training.resume import changed_keys
from tests.manifests import meta
from tests.runs import TINY, train
from tests.shared import ROOT


class Usage(NamedTuple):
    """Like the result of `shutil.disk_usage`."""

    total: int
    used: int
    free: int


def save(folder: Path, step: int, size: int = 100) -> Path:
    """Write a checkpoint with the right file names and sizes but no weights."""
    checkpoint = folder / "checkpoints" / f"step-{step:08}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "rank-00000.safetensors").write_bytes(b"x" * size)
    name, checksum = "rank-00000.safetensors", f"xxh3_128:{0:032}"
    files = [{"name": name, "bytes": size, "checksum": checksum, "fragments": []}]
    metadata = {**meta(step), "config": {"model": TINY["model"]}}
    manifest = {"format_version": CHECKPOINT_VERSION, "step": step, **metadata, "files": files}
    (checkpoint / "manifest.json").write_text(json.dumps(seal(manifest)))
    return checkpoint


def test_a_run_that_can_start(config: Path, tmp_path: Path) -> None:
    (line,) = check_run(config, (), tmp_path / "run", 4)
    assert "4 processes = tensor 1 x pipeline 1 x data 4" in line and "starts from scratch" in line
    checkpoint = save(tmp_path / "run", 3)
    (line,) = check_run(config, (), tmp_path / "run", 4)
    assert f"resumes from {checkpoint}" in line


def test_a_wrong_number_of_processes_lists_layouts_that_fit(config: Path) -> None:
    sets = ["training.global_batch_size=8", "parallel.tensor=2"]
    with pytest.raises(ConfigError) as raised:
        check_run(config, sets, Path("run"), 6)
    message = str(raised.value)
    assert "1 problem" in message and "training.global_batch_size = 8" in message
    # 3 processes can share 8 sequences only as the stages of a pipeline.
    same_batch = "--set parallel.tensor=2 --set parallel.pipeline=3"
    assert f"all 6 processes, the same batch: {same_batch}" in message
    assert "4 of the 6 processes, the same batch: --set parallel.tensor=2" in message


def test_an_elastic_run_uses_the_processes_that_fit(config: Path, tmp_path: Path) -> None:
    sets = ["training.global_batch_size=8", "parallel.tensor=2", "parallel.elastic=true"]
    note, last = check_run(config, sets, tmp_path / "run", 7)
    assert note.startswith("parallel.elastic: continuing with 4 of 7 processes: ")
    assert last.startswith("4 processes = tensor 2 x pipeline 1 x data 2; ")


def test_other_errors_list_no_layouts(config: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        check_run(config, ["model.heads=3"], Path("run"), 4)
    assert "model.heads" in str(raised.value) and "the same batch" not in str(raised.value)


@pytest.mark.parametrize("problem", ["missing", "truncated"])
def test_missing_and_truncated_shards_are_found(
    config: Path, corpus: Path, tmp_path: Path, problem: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    shard = next(path for path in copy.rglob("*.tar") if "train" in path.name)
    if problem == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match=shard.name):
        check_run(config, [f"data.path={copy}"], tmp_path / "run", 1)


def test_a_corpus_needs_no_validation_split(config: Path, corpus: Path, tmp_path: Path) -> None:
    """`prepare_bytes.py` leaves it empty if no document is in it; a run trains without it."""
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    index = json.loads((copy / "index.json").read_text())
    empty = {"tokens": 0, "text_bytes": 0, "documents": 0, "shards": []}
    for name, optional in (("validation", True), ("train", False)):
        splits = index["splits"] | {name: empty}
        (copy / "index.json").write_text(json.dumps(index | {"splits": splits}))
        if optional:
            check_run(config, [f"data.path={copy}"], tmp_path / "run", 1)
            continue
        with pytest.raises(DataError, match="'train' is empty"):
            check_run(config, [f"data.path={copy}"], tmp_path / "run", 1)


def test_all_unusable_inputs_are_listed(config: Path, corpus: Path, tmp_path: Path) -> None:
    """Sources are listed by number; an empty value is an error, too."""
    other, empty = tmp_path / "other", tmp_path / "empty"
    shutil.copytree(corpus, other)
    index = json.loads((other / "index.json").read_text())
    index["tokenizer"] = {"name": "sentencepiece", "vocab_size": 300, "eod": 2, "sha256": "a" * 64}
    (other / "index.json").write_text(json.dumps(index))
    empty.mkdir()
    paths = [corpus, other, empty, tmp_path / "absent"]
    sources = json.dumps([{"path": str(path), "name": path.name} for path in paths])
    sets = ["data.path=null", f"data.sources={sources}", "checkpoint.start_from="]
    with pytest.raises(ConfigError) as raised:
        check_inputs(load_config(config, sets), tmp_path / "run", remote=False)
    keys = [problem.key for problem in raised.value.problems]
    assert keys == [
        "model.vocab_size",
        *(f"data.sources entry {number}" for number in (2, 3, 4)),
        "checkpoint.start_from",
    ]
    messages = [problem.message for problem in raised.value.problems]
    assert f"its tokenizer is not that of {corpus}" in messages[1]
    assert "index.json: no such file" in messages[2] and "no such folder" in messages[3]
    assert messages[4] == "names no folder; null starts from scratch"
    for path in ("", "null"):
        with pytest.raises(ConfigError, match="1 problem\n  data.path = .*: no data: set it to"):
            check_inputs(load_config(config, [f"data.path={path}"]), tmp_path, remote=False)


def test_a_missing_tensorboard_is_found(config: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("hg_scale.training.check.find_spec", lambda name: None)
    loaded = load_config(config, ["logging.tensorboard=true"])
    with pytest.raises(ConfigError, match=r"logging\.tensorboard: .*hg-scale\[tensorboard\]"):
        check_inputs(loaded, tmp_path, remote=False)


def test_start_from_is_not_read_if_the_run_has_checkpoints(config: Path, tmp_path: Path) -> None:
    loaded = load_config(config, ["checkpoint.start_from=nowhere"])
    with pytest.raises(ConfigError, match="checkpoint.start_from"):
        check_inputs(loaded, tmp_path / "run", remote=False)
    save(tmp_path / "run", 3)
    (source,) = check_inputs(loaded, tmp_path / "run", remote=False)
    assert source.name == "shards"
    loaded = load_config(config, ["data.path=http://127.0.0.1:9/never-opened"])
    assert check_inputs(loaded, tmp_path / "run", remote=False) == []


def test_incomplete_checkpoints(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    older, newer = save(run, 3), save(run, 5)
    (newer / "rank-00000.safetensors").write_bytes(b"x")
    lines = check_run(config, (), run, 1)
    assert "skipping" in lines[0] and newer.name in lines[0] and older.name in lines[1]
    (older / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of the checkpoints is complete"):
        check_run(config, (), run, 1)
    with pytest.raises(ConfigError, match="checkpoint.start_from"):
        check_run(config, [f"checkpoint.start_from={newer}"], tmp_path / "other", 1)
    save(run, 2)
    lines = check_run(config, [f"checkpoint.start_from={run}"], tmp_path / "other", 1)
    assert "step-00000002" in " ".join(lines)


def test_a_checkpoint_of_another_model(config: Path, tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "run", 3)
    with pytest.raises(ConfigError, match=f"model.d_ff = 128: the checkpoint {checkpoint} has 64"):
        check_run(config, ["model.d_ff=128"], tmp_path / "run", 1)
    start = f"checkpoint.start_from={checkpoint}"
    with pytest.raises(ConfigError, match="model.d_ff"):
        check_run(config, ["model.d_ff=128", start], tmp_path / "other", 1)


def test_a_run_folder_that_cannot_be_created(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for run in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DiskError, match="cannot be written .*: not a folder.; choose another"):
            check_run(config, (), run, 1)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root
    with pytest.raises(DiskError, match="cannot be written .*: no write permission.; choose"):
        check_run(config, (), tmp_path / "run", 1)


@pytest.mark.parametrize(
    ("steps", "every", "done", "stop_at", "count"),
    [(6, 0, 0, None, 1), (6, 2, 0, None, 3), (7, 2, 0, None, 4), (7, 2, 4, None, 2),
     (7, 2, 0, 4, 2), (7, 2, 7, None, 0), (7, 10, 0, None, 1)],
)  # fmt: skip
def test_checkpoints_to_come(
    config: Path, steps: int, every: int, done: int, stop_at: int | None, count: int
) -> None:
    sets = [f"training.steps={steps}", f"checkpoint.every={every}"]
    assert checkpoints_to_come(load_config(config, sets), done, stop_at) == count


def test_a_disk_that_would_be_full(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_config(config, ["checkpoint.every=2"])
    checkpoint = save(tmp_path, 2, size=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 0, 2000))
    check_disk(loaded, tmp_path, checkpoint)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 0, 1999))
    with pytest.raises(DiskError, match=r"2 checkpoints to come .*room for 1"):
        check_disk(loaded, tmp_path, checkpoint)
    with pytest.raises(DiskError, match="3 checkpoints to come"):
        check_disk(loaded, tmp_path / "not" / "there", None)


@pytest.mark.parametrize(
    ("keep_every", "existing", "count"),
    [(0, (), 4), (0, (2,), 3), (0, (2, 4), 2), (0, (2, 4, 6), 1), (0, (2, 4, 6, 8, 10), 1),
     (4, (4, 8, 10), 3 + 23)],
)  # fmt: skip
def test_checkpoints_that_will_be_deleted_count_as_free_space(
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keep_every: int,
    existing: tuple[int, ...],
    count: int,
) -> None:
    """So that a requeued run can resume on the disk that it was started on."""
    keep = ["checkpoint.keep_last=3", f"checkpoint.keep_every={keep_every}"]
    loaded = load_config(config, ["checkpoint.every=2", "training.steps=100", *keep])
    size = 1000 if existing else 12 * parameter_count(loaded.model)
    paths = [save(tmp_path, step, size=1000) for step in existing]
    newest = paths[-1] if paths else None
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, count * size))
    check_disk(loaded, tmp_path, newest)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, count * size - 1))
    with pytest.raises(DiskError, match=f"{count} checkpoints to come "):
        check_disk(loaded, tmp_path, newest)


def test_the_command_reports_errors_in_one_line(config: Path, tmp_path: Path) -> None:
    """With the exit codes of `exit_codes.py`, and without importing torch."""
    run = tmp_path / "run"
    options = ("--config", str(config), "--run", str(run), "--check", "--world-size", "4")
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "torch.py").write_text("raise SystemExit(33)")
    environment = {"PYTHONPATH": f"{guard}:{ROOT}"}
    good = train(*options, environment=environment)
    assert (good.returncode, good.stderr) == (0, "") and "starts from scratch" in good.stdout
    wrong = train(*options, "--set", "parallel.tensor=3", environment=environment)
    assert wrong.returncode == 2 and "parallel.tensor" in wrong.stderr
    checkpoint = save(run, 3)
    (checkpoint / "manifest.json").write_text("{")
    corrupt = train(*options, environment=environment)
    assert corrupt.returncode == 1 and "start from scratch in another run folder" in corrupt.stderr
    assert "Traceback" not in wrong.stderr + corrupt.stderr and not (run / "logs").exists()


def test_changed_keys_that_affect_the_loss_curve() -> None:
    before = parse_config({"optimizer": {"learning_rate": 0.003}}).model_dump()
    del before["schedule"]["kind"]  # as if it were newer than the checkpoint
    now = {
        "optimizer": {"learning_rate": 0.001},
        "schedule": {"kind": "wsd", "decay_steps": 10},
        "training": {"steps": 65, "micro_batch_size": 2, "seed": 9},
        "model": {"dropout": 0.1},
    }
    assert changed_keys(parse_config(now), before) == [
        "optimizer.learning_rate 0.003 -> 0.001",
        "schedule.decay_steps 0 -> 10",
        "training.steps 1000 -> 65",
        "model.dropout 0.0 -> 0.1",
    ]
