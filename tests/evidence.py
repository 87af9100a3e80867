"""Make the recorded evidence again: `python -m tests.evidence [NAME ...]` (`make evidence`).

Each NAME is a command whose output is kept in `docs/evidence/NAME.txt`, under a header with the
command, the date and the commit. The table of README.md is made from these headers.
Exits with 1 if a command failed; its output is kept all the same.
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hg_scale.atomic_write import write_atomic
from tests.shared import ROOT

FOLDER = ROOT / "docs" / "evidence"
README = ROOT / "README.md"
BEGIN, END = "<!-- evidence: made by make evidence -->", "<!-- end of evidence -->"


@dataclass(frozen=True)
class Evidence:
    """What `command`, of the project's Python, shows; `minutes` on two quiet cores."""

    shows: str
    command: str
    minutes: int


EVIDENCE = {
    "layouts_fp32": Evidence(
        "a checkpoint of each of 8 layouts resumes in each of them (fp32)",
        "-m tests.cluster.pairs",
        6,
    ),
    "layouts_bf16": Evidence(
        "the same in bf16",
        "-m tests.cluster.pairs --precision bf16",
        6,
    ),
    "kills": Evidence(
        "kills of a random rank, many of them inside a save: the same curve, bit for bit",
        "-m tests.cluster.kills --kills 25",
        8,
    ),
}


def commit() -> str:
    """Return the abbreviated commit of the tree, `+` appended if files differ from it."""
    head = _git("rev-parse", "--short=7", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "hg_scale", "tests")
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def gather(name: str) -> bool:
    """Run a command and keep its output; return whether it succeeded."""
    evidence = EVIDENCE[name]
    shown = f"python {evidence.command}"
    print(f"{name}: {shown} (about {evidence.minutes} min)", flush=True)
    command = [sys.executable, *shlex.split(evidence.command)]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    result = "ok" if done.returncode == 0 else f"FAILED with exit code {done.returncode}"
    day = datetime.datetime.now(datetime.UTC).date()
    header = f"command: {shown}\ndate: {day}\ncommit: {commit()}\nresult: {result}\n\n"
    write_atomic(FOLDER / f"{name}.txt", (header + done.stdout).encode())
    print(f"{name}: {result}", flush=True)
    return done.returncode == 0


def header_of(path: Path) -> dict[str, str]:
    """Return the fields above the first empty line of a file of evidence."""
    head = path.read_text().partition("\n\n")[0]
    return dict(line.split(": ", 1) for line in head.splitlines())


def table() -> str:
    """Return the Markdown table of the evidence on record."""
    lines = ["| shown | on | at commit | result |", "| --- | --- | --- | --- |"]
    for name, evidence in EVIDENCE.items():
        path = FOLDER / f"{name}.txt"
        if path.exists():
            head = header_of(path)
            link = f"[{evidence.shows}]({path.relative_to(ROOT)})"
            lines.append(f"| {link} | {head['date']} | {head['commit']} | {head['result']} |")
        else:
            lines.append(f"| {evidence.shows} | not made yet | | |")
    return "\n".join(lines)


def replace_table(page: str) -> str:
    """Return README.md with the table of today's evidence between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"README.md: expected a line {BEGIN} and, below it, {END}"
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EVIDENCE))
    names = parser.parse_args().names or list(EVIDENCE)
    if unknown := set(names) - set(EVIDENCE):
        parser.error(f"{', '.join(sorted(unknown))}: expected one of {', '.join(EVIDENCE)}")
    failed = [name for name in names if not gather(name)]
    write_atomic(README, replace_table(README.read_text()))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
