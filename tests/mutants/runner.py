"""Plant faults one at a time and see whether a test fails: `python -m tests.mutants`.

Each fault is planted in a copy of the tree, in a process forked from one that has imported torch
and the like, and the tests named for it run until the first failure. First the same tests run
without a fault, since a test that always fails notices nothing.

caught      a test failed
SURVIVED    all passed: a test is missing
equivalent  all passed, as the list says and explains
UNDECIDED   out of time, or no test ran
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from queue import SimpleQueue

from tests.mutants import MUTANTS
from tests.mutants.mutant import Mutant
from tests.shared import ROOT, SHARED

SECONDS = 600  # for the tests of one fault
COPIED = (".ci", "hg_scale", "tests", "configs", "data_prep", "benchmarks", "slurm", "docs")
PASSED, FAILED, INTERRUPTED = 0, 1, 2  # exit codes of pytest; the last: a test cannot be imported


@dataclass(frozen=True)
class Result:
    """What became of a planted fault; `by`: the test that noticed it."""

    name: str
    outcome: str
    seconds: float
    by: str = ""

    def __str__(self) -> str:
        line = f"{self.outcome:<10} {self.seconds:5.1f} s  {self.name}"
        return f"{line}\n{'':<21}{self.by}" if self.by else line


def plant(tree: Path, mutant: Mutant) -> Callable[[], None]:
    """Replace the one text of a fault in a tree; return what takes it back."""
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    if (count := text.count(mutant.old)) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} has its text {count} times, expected once")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")

    def take_back() -> None:
        path.write_text(text, encoding="utf-8")

    return take_back


def judge(mutant: Mutant, code: int | None, output: str) -> tuple[str, str]:
    """Return the outcome of a fault and the test that noticed it, from pytest's exit code."""
    if code in (FAILED, INTERRUPTED):
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        return "caught", failed[1] if failed else ""
    if code == PASSED:
        return ("equivalent" if mutant.equivalent else "SURVIVED"), mutant.equivalent
    return "UNDECIDED", ""


def run_tests(tree: Path, tests: str) -> tuple[int | None, str]:
    """Run pytest in a forked process; return its exit code (None: out of time) and its output."""
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        process = os.fork()
        if process == 0:
            _be_pytest(tree, tests, Path(scratch), log)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                _end_group(process)
                return os.waitstatus_to_exitcode(status), log.read_text(errors="replace")
            time.sleep(0.05)
        _end_group(process)
        os.waitpid(process, 0)
        return None, log.read_text(errors="replace")


def _end_group(process: int) -> None:
    """End a test process and what it started."""
    try:
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:
        return


def _be_pytest(tree: Path, tests: str, scratch: Path, log: Path) -> None:
    """Become a run of pytest on a tree; does not return."""
    import pytest

    os.setsid()
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "hg_scale")]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path or ".") != ROOT)]
    # No bytecode: a fault of the same size and second would run as the text that it replaced.
    sys.dont_write_bytecode = True
    os.environ.update(
        PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE="1", HG_SCALE_SHARED=str(SHARED),
        TMPDIR=str(scratch),
    )  # fmt: skip
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no", "-rfE"]
    code = 3
    try:
        code = int(pytest.main([*arguments, *shlex.split(tests)]))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def trees(count: int) -> Iterator[SimpleQueue[Path]]:
    """Copies of the tree, each for one fault at a time."""
    with tempfile.TemporaryDirectory() as folder:
        free: SimpleQueue[Path] = SimpleQueue()
        for number in range(count):
            tree = Path(folder) / f"tree-{number}"
            tree.mkdir()
            for name in COPIED:
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, tree / name, ignore=ignore)
            for path in ROOT.iterdir():
                if path.is_file() and path.name != ".git":
                    shutil.copy(path, tree / path.name)
            free.put(tree)
        yield free


def preload() -> None:
    """Import what every test needs and no fault touches."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # noqa: F401
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)


def try_mutants(mutants: Iterable[Mutant], workers: int) -> list[Result]:
    """Plant each fault and print what became of it."""
    with trees(workers) as free, ThreadPoolExecutor(workers) as pool:

        def work(mutant: Mutant) -> Result:
            tree, start = free.get(), time.monotonic()
            take_back = plant(tree, mutant)
            try:
                outcome, by = judge(mutant, *run_tests(tree, mutant.tests))
            finally:
                take_back()
                free.put(tree)
            result = Result(mutant.name, outcome, time.monotonic() - start, by)
            print(result, flush=True)
            return result

        return list(pool.map(work, mutants))


def failing_tests(mutants: Iterable[Mutant], workers: int) -> list[str]:
    """Return the tests that fail without a fault, or run none."""
    with trees(workers) as free, ThreadPoolExecutor(workers) as pool:
        tests_of_all = list(dict.fromkeys(m.tests for m in mutants))
        done = count(1)

        def work(tests: str) -> str | None:
            tree = free.get()
            code, output = run_tests(tree, tests)
            free.put(tree)
            print(f"without a fault: {next(done)} of {len(tests_of_all)}", flush=True)
            return None if code == PASSED else f"{tests}: {output[-2000:]}"

        return [found for found in pool.map(work, tests_of_all) if found]


def main() -> None:
    parser = argparse.ArgumentParser(description="Plant faults and see whether a test fails.")
    parser.add_argument("words", nargs="*", metavar="WORD", help="only faults whose name has one")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="at once (default: 2)")
    parser.add_argument("--trust-tests", action="store_true", help="do not first run the tests "
                        "without a fault, which takes as long again")  # fmt: skip
    options = parser.parse_args()
    mutants = [
        m for m in MUTANTS if not options.words or any(word in m.name for word in options.words)
    ]
    start = time.monotonic()
    preload()
    if not options.trust_tests and (broken := failing_tests(mutants, options.workers)):
        sys.exit("these tests fail without a fault:\n" + "\n".join(broken))
    results = try_mutants(mutants, options.workers)
    counts = Counter(result.outcome for result in results)
    summary = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    print(f"\n{len(results)} faults in {(time.monotonic() - start) / 60:.0f} minutes: {summary}")
    if counts["SURVIVED"] or counts["UNDECIDED"]:
        sys.exit(1)
