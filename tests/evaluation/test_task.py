"""`hg-scale evaluate` on runs, checkpoints and exports, with shards and plain files."""

from __future__ import annotations

import gzip
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
import pyarrow
import pytest
import torch
from pyarrow import parquet

from hg_scale.commands.main import main
from hg_scale.data.preparation.in_order import Preparation, prepare_bytes
from hg_scale.evaluation import task as task_module
from hg_scale.evaluation.task import EvaluationTask
from tests.runs import TINY, records, train_in
from tests.world import Worlds


@pytest.fixture(scope="module")
def run(worlds: Worlds, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny model, 6 steps long."""
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


def test_score_equals_the_validation_of_the_training(run: Path, tmp_path: Path) -> None:
    figures = evaluate(tmp_path, str(run), "--split", "validation")
    expected = records(run)[-1]
    assert figures["bits_per_byte"] == pytest.approx(expected["validation_bits_per_byte"], rel=1e-5)
    assert (figures["step"], figures["window"], figures["stride"]) == (6, 32, 32)


@pytest.mark.parametrize("protocol", [(), ("--window", "48", "--stride", "20")])
def test_processes_and_batch_size_change_nothing(
    run: Path, tmp_path: Path, protocol: tuple[str, ...]
) -> None:
    common = (str(run), "--split", "validation", *protocol)
    single = evaluate(tmp_path, *common)
    split = evaluate(tmp_path, *common, "--processes", "2", "--batch", "5")
    assert split["bits_per_byte"] == pytest.approx(single["bits_per_byte"], rel=1e-6)
    half = "interval_95_half_width"
    assert split[half] == pytest.approx(single[half], rel=1e-3)
    assert split["tokens"] == single["tokens"]
    for key in ("nats_by_position", "nats_by_phase"):
        for a, b in zip(split[key], single[key], strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        assert sum(entry["tokens"] for entry in single[key]) == single["tokens"]


@pytest.mark.parametrize("processes", [1, 2])
def test_progress_adds_up_to_the_total(run: Path, processes: int) -> None:
    calls: list[tuple[int, int]] = []
    task = EvaluationTask(run, split="validation", windows=20)
    _, score = task_module.evaluate(task, processes, lambda *arguments: calls.append(arguments))
    assert calls[0] == (0, score.tokens) and {total for _, total in calls} == {score.tokens}
    assert sum(tokens for tokens, _ in calls) == score.tokens


def test_ctrl_c_ends_all_processes_with_one_line(run: Path) -> None:
    command = [sys.executable, "-m", "hg_scale.commands.main", "evaluate", str(run), "--window"]
    with subprocess.Popen(
        [*command, "48", "--stride", "1", "--processes", "2"],
        start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # A shell script starts background jobs with SIGINT ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        workers: list[psutil.Process] = []
        while len(workers) < 2:
            workers = [c for c in psutil.Process(process.pid).children() if is_worker(c)]
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "hg-scale evaluate: interrupted\n")
    assert not any(worker.is_running() for worker in workers)


def is_worker(process: psutil.Process) -> bool:
    return "spawn_main" in " ".join(process.cmdline())


def test_score_does_not_depend_on_the_training_layout(
    run: Path, worlds: Worlds, tmp_path: Path
) -> None:
    """The same weights saved by one rank, and by four after a step with a learning rate of 0."""
    shutil.copytree(run, tmp_path / "run")
    sets = ("training.steps=7", "optimizer.learning_rate=1e-30", "parallel.tensor=2")
    overrides = [word for key in sets for word in ("--set", key)]
    config = str(tmp_path / "run" / "config.json")
    done = train_in(
        worlds, 4, tmp_path, "--config", config, "--run", str(tmp_path / "run"), *overrides
    )
    assert done.code == 0, done.output
    for protocol in ((), ("--window", "48", "--stride", "20")):
        one_rank, four_ranks = (
            evaluate(tmp_path, str(folder), "--split", "validation", *protocol)
            for folder in (run, tmp_path / "run")
        )
        assert (one_rank["step"], four_ranks["step"]) == (6, 7)
        assert four_ranks["bits_per_byte"] == pytest.approx(one_rank["bits_per_byte"], rel=1e-6)


def test_stride_of_a_window_is_no_overlap(run: Path, tmp_path: Path) -> None:
    consecutive = evaluate(tmp_path, str(run), "--context", "40")
    sliding = evaluate(tmp_path, str(run), "--window", "40", "--stride", "40")
    assert sliding == consecutive


def test_file_scores_like_shards_of_its_text(run: Path, tmp_path: Path) -> None:
    """A text without documents, as a plain file and prepared as a test split."""
    text = b"pack my box with five dozen liquor jugs. " * 20
    (tmp_path / "source").write_bytes(b"0" * 400 + text)
    job = Preparation(tmp_path / "source", tmp_path / "shards", split=(200, 200, len(text)))
    prepare_bytes(job)
    (tmp_path / "text").write_bytes(text)

    def after_the_first_window(data: str) -> float:
        """Nats after the first window, whose start token differs between the two."""
        full = evaluate(tmp_path, str(run), "--data", str(tmp_path / data))
        first = evaluate(tmp_path, str(run), "--data", str(tmp_path / data), "--windows", "1")
        assert (full["bytes"], full["tokens"]) == (len(text), len(text))
        return float(
            full["nats_per_token"] * full["tokens"] - first["nats_per_token"] * first["tokens"]
        )

    assert after_the_first_window("text") == pytest.approx(
        after_the_first_window("shards"), rel=1e-6
    )


def test_first_token_zero_gives_no_window_the_token_before_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Windows of one token then know nothing of the text: one loss per byte value."""
    text = b"aababb" * 5
    (tmp_path / "text").write_bytes(text)
    common = (str(run), "--data", str(tmp_path / "text"), "--context", "1")
    zero = evaluate(tmp_path, *common, "--first-token", "zero")
    assert ", each after token id 0" in capsys.readouterr().out
    single = {}
    for letter in b"ab":
        (tmp_path / "letter").write_bytes(bytes([letter]))
        options = ("--data", str(tmp_path / "letter"), "--first-token", "zero")
        single[letter] = evaluate(tmp_path, str(run), *options)["nats_per_token"]
    expected = sum(single[letter] for letter in text) / len(text)
    assert zero["nats_per_token"] == pytest.approx(expected, rel=1e-6)
    assert single[ord("a")] != single[ord("b")]
    previous = evaluate(tmp_path, *common)
    assert previous["nats_per_token"] != pytest.approx(expected, rel=1e-4)
    assert (zero["first_token"], previous["first_token"]) == ("zero", "previous")


def test_packed_files_and_tables_score_like_their_text(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compressed text as the text; documents in tables as the shards prepared from them."""
    texts = ["pack my box with five dozen", " liquor jugs, é" * 9, "the quick brown fox " * 9]
    (tmp_path / "in").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "in" / f"{number}.txt").write_text(text)
    prepare_bytes(Preparation(tmp_path / "in", tmp_path / "shards", split=(0.0, 0.0, 1.0)))
    table = pyarrow.table({"body": [texts[0], None, *texts[1:]]})
    parquet.write_table(table, tmp_path / "a.bin")
    (tmp_path / "a.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"body": t}) + "\n" for t in texts).encode())
    )
    (tmp_path / "text").write_text("".join(texts))
    (tmp_path / "packed").write_bytes(gzip.compress((tmp_path / "text").read_bytes()))
    shards, lines, columns, plain, packed, raw = (
        {**evaluate(tmp_path, str(run), "--data", str(tmp_path / name), *more), "text": None}
        for name, *more in (
            ("shards",), ("a.jsonl.gz", "--field", "body"), ("a.bin", "--field", "body"),
            ("text",), ("packed",), ("packed", "--bytes-as-they-are"),
        )
    )  # fmt: skip
    size = len("".join(texts).encode())
    assert shards == lines == columns and (lines["bytes"], lines["tokens"]) == (size, size + 3)
    assert plain == packed and (plain["bytes"], plain["tokens"]) == (size, size)
    assert raw["bytes"] == (tmp_path / "packed").stat().st_size
    (tmp_path / "image").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
    capsys.readouterr()
    for options, message in (
        (["--data", str(tmp_path / "image")], "image: is a PNG image, not text"),
        (["--data", str(tmp_path / "a.bin")], "a.bin: has no column 'text' (it has: body)"),
        (["--bytes-as-they-are"], "--bytes-as-they-are: needs --data FILE"),
    ):
        assert main(["evaluate", str(run), *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_export_scores_a_file_without_its_data(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(b"the quick brown fox " * 20)
    assert main(["convert", "export", str(run), str(tmp_path / "export")]) == 0
    expected = evaluate(tmp_path, str(run), "--data", str(file))
    exported = evaluate(tmp_path, str(tmp_path / "export"), "--data", str(file))
    assert exported["bits_per_byte"] == expected["bits_per_byte"]


def test_shard_is_not_scored_as_text(
    run: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = next(corpus.glob("*.tar"))
    for options, message in (
        (("--data", str(shard)), "a shard, not a text file; name its folder"),
        (("--data", __file__, "--split", "validation"), "has no 'validation' split"),
    ):
        assert main(["evaluate", str(run), *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    folder, index = (
        evaluate(tmp_path, str(run), "--data", str(path), "--windows", "3")
        for path in (corpus, corpus / "index.json")
    )
    assert folder == index


def test_worker_reports_its_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(task_module, "prepare_evaluation", fail)
    messages: list[Any] = []
    results = SimpleNamespace(put=messages.append, close=lambda: None, join_thread=lambda: None)
    threads = torch.get_num_threads()
    try:
        task_module._worker(EvaluationTask(Path("nowhere")), 1, 2, results)
    finally:
        torch.set_num_threads(threads)
    ((rank, kind, value),) = messages
    assert (rank, kind) == (1, "error")
    assert value == "process 1 of the evaluation failed: RuntimeError: out of memory"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--window", "32", "--stride", "33"), "at most --window 32"),
        (("--stride", "3"), "--stride: needs --window"),
        (("--context", "0"), "--context: expected 1 or more"),
        (("--context", "8", "--window", "8"), "give only one of them"),
        (("--data", "nowhere"), "nowhere"),
        (("--split", "tset"), "tset"),
        (("--data", "/dev/null"), "/dev/null: a pipe or a device"),
        (("--data", "nowhere", "--json", "/nowhere/figures.json"), "figures.json: cannot be"),
    ],
)
def test_invalid_options_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main(["evaluate", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err
