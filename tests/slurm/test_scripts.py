"""Static checks of the launchers: shellcheck, common lines, headers that match the code."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hg_scale import exit_codes
from tests.shared import ROOT

SLURM = ROOT / "slurm"
LIBRARY = {"common.sh", "site.sh"}
LAUNCHERS = sorted(p for p in SLURM.glob("*.sh") if p.name not in LIBRARY)
NAMES = {
    "convert.sh", "evaluate.sh", "prepare_data.sh", "selftest.sh", "sweep_array.sh",
    "train_1node.sh", "train_64gpu.sh",
}  # fmt: skip


def header(path: Path) -> str:
    """Return the comment at the top of a script."""
    lines = path.read_text().splitlines()[1:]
    end = next(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def body(path: Path) -> str:
    """Return the part after the lines that find common.sh."""
    return path.read_text().partition("|| exit 2\n")[2]


def test_launchers_are_complete() -> None:
    assert {path.name for path in LAUNCHERS} == NAMES


def test_shellcheck_passes() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    files = [*map(str, sorted(SLURM.glob("*.sh"))), str(ROOT / ".ci" / "run")]
    done = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_header_lists_the_variables_that_are_read(path: Path) -> None:
    """Exactly those; and it names the launcher where it explains how to submit it."""
    listed = set(re.findall(r"^  ([A-Z_]+)  +\S", header(path), re.MULTILINE))
    text = body(path)
    read = set(re.findall(r"\$\{?([A-Z][A-Z_]+)\b", text))
    own = set(re.findall(r"(?:export )?\b([A-Z][A-Z_]+)\+?=", text))
    foreign = {name for name in read if name.startswith(("SLURM_", "HG_"))}
    assert listed == {*read, *own} - foreign - {name for name in own if name.startswith("HG_")}
    assert f"sbatch slurm/{path.name}" in header(path) or f"slurm/{path.name}" in header(path)
    assert "site.sh" in header(path)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_defaults_in_the_header_are_those_of_the_script(path: Path) -> None:
    text = body(path)
    for name, default in re.findall(r"^  ([A-Z]+)  .*\(default: (\S+?)\)$", header(path), re.M):
        assert f"${{{name}:-{default}}}" in text
        assert (ROOT / default).is_file()


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_launchers_find_common_sh_identically_and_append_to_their_log(path: Path) -> None:
    text = path.read_text()
    start = text.index("# Slurm runs a spooled copy")
    finder = text[start : text.index("|| exit 2\n")].replace(path.name, "NAME")
    other = LAUNCHERS[0].read_text()
    begin = other.index("# Slurm runs a spooled copy")
    assert finder == other[begin : other.index("|| exit 2\n")].replace(LAUNCHERS[0].name, "NAME")
    assert "#SBATCH --open-mode=append" in text  # a requeued job continues the same file
    output = re.search(r"#SBATCH --output=(\S+)", text)
    assert output and "/" not in output[1]  # a missing folder would end the job without any message
    assert path.stat().st_mode & 0o111


def test_every_variable_of_site_sh_is_read_and_documented() -> None:
    site, common = (SLURM / "site.sh").read_text(), (SLURM / "common.sh").read_text()
    settings = set(re.findall(r"\b(HG_[A-Z_]+)=", site))
    everything = common + "".join(path.read_text() for path in LAUNCHERS)
    for name in settings:
        assert re.search(rf"\$\{{?{name}\b", everything), f"{name} is never read"
    internal = {"HG_CODE", "HG_COPIES", "HG_END_TIME", "HG_ROOT", "HG_SITE"}
    read = set(re.findall(r"\$\{?(HG_[A-Z_]+)", everything))
    assert read - internal <= settings
    docs = (ROOT / "docs" / "slurm.md").read_text()
    assert all(name in docs for name in settings | {"HG_SITE"})


def test_common_sh_and_docs_handle_every_exit_code() -> None:
    """The numbers in the case statement are those of `exit_codes.py`, which the docs list."""
    common = (SLURM / "common.sh").read_text()
    handled = dict(re.findall(r"^ +(\d+)\) (hg_\w+) ", common, re.MULTILINE))
    named = set(exit_codes.MEANINGS) - {exit_codes.FAILED}
    assert {int(code) for code in handled} == named
    for code, function in handled.items():
        assert (function == "hg_requeue") == exit_codes.starts_again(int(code))
    docs = (ROOT / "docs" / "slurm.md").read_text()
    for code in exit_codes.MEANINGS:
        assert re.search(rf"^\| {code} \|", docs, re.MULTILINE), f"{code} is not in docs/slurm.md"


def test_exit_codes_of_srun_have_a_meaning() -> None:
    """srun returns 128 plus the signal of a killed rank, and 255 if a lost node ended the step."""
    assert exit_codes.meaning(137) == "lost a rank or a node (signal 9)"
    assert exit_codes.meaning(255) == "lost a rank or a node"
    assert exit_codes.starts_again(137) and exit_codes.starts_again(255)
