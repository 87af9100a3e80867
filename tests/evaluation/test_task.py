"""`hg-scale evaluate` of a run, a checkpoint, an export; on shards and on files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from hg_scale.commands.main import main
from hg_scale.data.preparation.in_order import Preparation, prepare_bytes
from hg_scale.evaluation import task as task_of
from hg_scale.evaluation.task import EvaluationTask
from tests.runs import records, train_in
from tests.world import Worlds


@pytest.fixture(scope="module")
def run(worlds: Worlds, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny model, 6 steps long."""
    from tests.runs import TINY

    folder = tmp_path_factory.mktemp("evaluated")
    config = folder / "tiny.json"
    config.write_text(json.dumps({**TINY, "data": {"path": str(corpus)}}))
    arguments = ("--config", str(config), "--set", "training.validation_windows=null")
    done = train_in(worlds, 1, folder, *arguments, "--run", str(folder / "run"))
    assert done.code == 0, done.output
    return folder / "run"


def evaluate(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "figures.json"
    assert main(["evaluate", *arguments, "--json", str(path)]) == 0
    return dict(json.loads(path.read_text()))


def test_it_gives_the_validation_of_the_training(run: Path, tmp_path: Path) -> None:
    figures = evaluate(tmp_path, str(run), "--split", "validation")
    expected = records(run)[-1]
    assert figures["bits_per_byte"] == pytest.approx(expected["validation_bits_per_byte"], rel=1e-5)
    assert (figures["step"], figures["window"], figures["stride"]) == (6, 32, 32)


@pytest.mark.parametrize("protocol", [(), ("--window", "48", "--stride", "20")])
def test_processes_and_batches_change_nothing(
    run: Path, tmp_path: Path, protocol: tuple[str, ...]
) -> None:
    common = (str(run), "--split", "validation", *protocol)
    alone = evaluate(tmp_path, *common)
    shared = evaluate(tmp_path, *common, "--processes", "2", "--batch", "5")
    assert shared["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-6)
    half = "interval_95_half_width"
    assert shared[half] == pytest.approx(alone[half], rel=1e-3)
    assert shared["tokens"] == alone["tokens"]
    for places in ("nats_by_position", "nats_by_phase"):
        for a, b in zip(shared[places], alone[places], strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        assert sum(place["tokens"] for place in alone[places]) == alone["tokens"]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_progress_knows_its_end(run: Path, processes: int) -> None:
    told: list[tuple[int, int]] = []
    task = EvaluationTask(run, split="validation", windows=20)
    _, score = task_of.evaluate(task, processes, lambda *of: told.append(of))
    assert told[0] == (0, score.tokens) and {of for _, of in told} == {score.tokens}
    assert sum(tokens for tokens, _ in told) == score.tokens


def test_ctrl_c_ends_all_processes_in_a_line(run: Path) -> None:
    command = [sys.executable, "-m", "hg_scale.commands.main", "evaluate", str(run), "--window"]
    with subprocess.Popen(
        [*command, "48", "--stride", "1", "--processes", "2"],
        start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # What runs in the background of a script has it ignored, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        workers: list[psutil.Process] = []
        while len(workers) < 2:  # these begin with seconds of imports
            workers = [c for c in psutil.Process(process.pid).children() if is_worker(c)]
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "hg-scale evaluate: interrupted\n")
    assert not any(worker.is_running() for worker in workers)


def is_worker(process: psutil.Process) -> bool:
    return "spawn_main" in " ".join(process.cmdline())


def test_the_layout_that_wrote_the_weights_changes_nothing(
    run: Path, worlds: Worlds, tmp_path: Path
) -> None:
    """The same weights by one rank, and by four after a step that moves nothing."""
    shutil.copytree(run, tmp_path / "run")
    sets = ("training.steps=7", "optimizer.learning_rate=1e-30", "parallel.tensor=2")
    overrides = [word for key in sets for word in ("--set", key)]
    config = str(tmp_path / "run" / "config.json")
    done = train_in(
        worlds, 4, tmp_path, "--config", config, "--run", str(tmp_path / "run"), *overrides
    )
    assert done.code == 0, done.output
    for protocol in ((), ("--window", "48", "--stride", "20")):
        ours, theirs = (
            evaluate(tmp_path, str(folder), "--split", "validation", *protocol)
            for folder in (run, tmp_path / "run")
        )
        assert (ours["step"], theirs["step"]) == (6, 7)
        assert theirs["bits_per_byte"] == pytest.approx(ours["bits_per_byte"], rel=1e-6)


def test_sliding_by_the_window_is_no_context(run: Path, tmp_path: Path) -> None:
    chunks = evaluate(tmp_path, str(run), "--context", "40")
    slides = evaluate(tmp_path, str(run), "--window", "40", "--stride", "40")
    assert slides == chunks


def test_a_file_is_scored_like_shards_of_its_text(run: Path, tmp_path: Path) -> None:
    """One text without documents: as a plain file, and prepared as a test split."""
    text = b"pack my box with five dozen liquor jugs. " * 20
    (tmp_path / "whole").write_bytes(b"0" * 400 + text)
    job = Preparation(tmp_path / "whole", tmp_path / "shards", split=(200, 200, len(text)))
    prepare_bytes(job)
    (tmp_path / "text").write_bytes(text)

    def after_the_first_window(data: str) -> float:
        """Nats: the first begins after the end of a document in one, after nothing in the other."""
        whole = evaluate(tmp_path, str(run), "--data", str(tmp_path / data))
        first = evaluate(tmp_path, str(run), "--data", str(tmp_path / data), "--windows", "1")
        assert (whole["bytes"], whole["tokens"]) == (len(text), len(text))
        return float(
            whole["nats_per_token"] * whole["tokens"] - first["nats_per_token"] * first["tokens"]
        )

    assert after_the_first_window("text") == pytest.approx(
        after_the_first_window("shards"), rel=1e-6
    )


def test_an_export_scores_a_file_without_its_data(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(b"the quick brown fox " * 20)
    assert main(["convert", "export", str(run), str(tmp_path / "export")]) == 0
    ours = evaluate(tmp_path, str(run), "--data", str(file))
    theirs = evaluate(tmp_path, str(tmp_path / "export"), "--data", str(file))
    assert theirs["bits_per_byte"] == ours["bits_per_byte"]


def test_a_shard_is_not_scored_as_text(
    run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = next(corpus.glob("*.tar"))
    for words, said in (
        (("--data", str(shard)), "a shard is no text; name its folder"),
        (("--data", __file__, "--split", "validation"), "has no 'validation' split"),
    ):
        assert main(["evaluate", str(run), *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    folder, index = (
        evaluate(tmp_path, str(run), "--data", str(path), "--windows", "3")
        for path in (corpus, corpus / "index.json")
    )
    assert folder == index


def test_a_process_says_what_it_died_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(task_of, "open_subject", fail)
    told: list[Any] = []
    results = SimpleNamespace(put=told.append, close=lambda: None, join_thread=lambda: None)
    threads = torch.get_num_threads()
    try:
        task_of._work(EvaluationTask(Path("nowhere")), 1, 2, results)
    finally:
        torch.set_num_threads(threads)
    ((rank, kind, said),) = told
    assert (rank, kind) == (1, "fault")
    assert said == "process 1 of the evaluation failed: RuntimeError: out of memory"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--window", "32", "--stride", "33"), "at most --window 32"),
        (("--stride", "3"), "--stride: needs --window"),
        (("--context", "0"), "--context: expected a number above 0"),
        (("--context", "8", "--window", "8"), "give one of them"),
        (("--data", "nowhere"), "nowhere"),
        (("--split", "tset"), "tset"),
        (("--data", "/dev/null"), "/dev/null: a pipe or a device"),
        (("--data", "nowhere", "--json", "/nowhere/figures.json"), "figures.json: cannot be"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert main(["evaluate", str(run), *arguments]) == 2
    assert words in capsys.readouterr().err
