"""Plant plausible bugs, one at a time, and see whether a test fails: `make mutants`.

Each mutant replaces one piece of text of one file in a copy of the repository and runs the tests
named for it, stopping at the first failure. A mutant that no test catches has survived: either the
tests lack something, or the change is equivalent, which `equivalent` then explains.

    python tests/mutants.py                 # all of them; prints a table and writes it to --output
    python tests/mutants.py --only loss     # those whose name contains a word
    python tests/mutants.py --check         # only that every replaced text exists exactly once
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.mutants_list import MUTANTS, Mutant  # noqa: E402
from tests.shared import ROOT  # noqa: E402

COPIED = ("hg_scale", "tests", "configs", "data_prep", "slurm", "benchmarks", "docs")
FILES = ("pyproject.toml", "Makefile", "README.md", "CHANGELOG.md", "constraints.txt")
TIMEOUT = 900  # seconds for the tests of one mutant


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: the test that caught it, or "" where none did."""

    mutant: Mutant
    caught_by: str
    seconds: float

    @property
    def line(self) -> str:
        verdict = "caught" if self.caught_by else "SURVIVED"
        if not self.caught_by and self.mutant.equivalent:
            verdict = "equivalent"
        why = self.caught_by or self.mutant.equivalent
        return f"{verdict:10}  {self.mutant.name:44}  {self.seconds:5.0f} s  {why}"


def check(mutant: Mutant) -> str | None:
    """Why a mutant cannot be planted; None: it can."""
    path = ROOT / mutant.file
    if not path.is_file():
        return f"{mutant.name}: {mutant.file} does not exist"
    count = path.read_text(encoding="utf-8").count(mutant.old)
    return None if count == 1 else f"{mutant.name}: {mutant.file} holds its text {count} times"


def run(mutant: Mutant) -> Outcome:
    """Plant a mutant in a copy of the repository and run its tests."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        for name in COPIED:
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in FILES:
            shutil.copy(ROOT / name, copy / name)
        path = copy / mutant.file
        path.write_text(path.read_text(encoding="utf-8").replace(mutant.old, mutant.new))
        environment = os.environ | {
            "PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(copy / ".hypothesis"), "TMPDIR": folder,
        }  # fmt: skip
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", ""]
        try:
            done = subprocess.run(
                [*command, *mutant.tests.split()], cwd=copy, env=environment, text=True,
                capture_output=True, timeout=TIMEOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Outcome(mutant, "a timeout", time.monotonic() - start)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    caught = failed[0].partition(" - ")[0].split("::")[-1] if failed else ""
    if done.returncode and not failed:
        caught = f"exit code {done.returncode}"
    return Outcome(mutant, caught, time.monotonic() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="WORD", help="mutants whose name has it")
    parser.add_argument("--jobs", type=int, default=1, help="at a time (default: 1)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table there, too")
    parser.add_argument("--check", action="store_true", help="only check that all can be planted")
    options = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if options.only in mutant.name]
    problems = [problem for mutant in mutants if (problem := check(mutant))]
    if problems or options.check:
        print("\n".join(problems) or f"{len(mutants)} mutants can be planted")
        return 1 if problems else 0
    lines = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(run, mutants):
            print(outcome.line, flush=True)
            lines.append(outcome.line)
    survived = sum(line.startswith("SURVIVED") for line in lines)
    summary = f"{len(lines)} mutants, {survived} survived"
    print(summary)
    if options.output:
        options.output.write_text("\n".join([*sorted(lines), summary]) + "\n")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
