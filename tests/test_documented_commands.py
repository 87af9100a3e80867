"""The commands in README.md and docs/ parse, so that their options exist."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from typing import Any

import pytest

from hg_scale.commands import main as verbs
from tests.shared import ROOT

PAGES = ("README.md", *sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("docs/*.md")))
OURS = re.compile(r"(data_prep|benchmarks|hg_scale|tests)/\w+\.py$|hg-scale$")


def commands() -> list[str]:
    """Return the lines of code blocks and the inline code that call a script of this repository."""
    found: list[str] = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M)
        lines = [line for block in blocks for line in block.split("\n")]
        lines += re.findall(r"`([^`\n]+ [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
        found += [line for line in lines if any(map(OURS.search, line.split()))]
    found = [line for line in dict.fromkeys(found) if not line.lstrip().startswith("#")]
    # Leave out templates, and verbs that the text only mentions.
    return [
        line for line in found if "VERB" not in line and "..." not in line and len(line.split()) > 2
    ]


def shell_words(command: str) -> list[str]:
    """Return the words of the first command of a line, without what the shell does with it."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    ends = [i for i, word in enumerate(words) if set(word) <= set("|;&<>()")]
    return words[: ends[0]] if ends else words


class Parsed(BaseException):
    """Raised in place of running a command whose arguments have parsed."""


@pytest.mark.parametrize("command", commands())
def test_documented_command_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shell_words(command)
    start = next(i for i, word in enumerate(words) if OURS.search(word))
    original = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *arguments: Any) -> None:
        original(self, *arguments)  # exits 2 where an option is wrong
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", words[start:])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(Parsed):
        if words[start] == "hg-scale":
            verbs.main()
        else:
            runpy.run_path(str(ROOT / words[start]), run_name="__main__")


def test_every_data_script_is_documented() -> None:
    scripts = {word for command in commands() for word in command.split()}
    expected = {path.name for path in (ROOT / "data_prep").glob("*.py")}
    assert expected <= {word.rpartition("/")[2] for word in scripts}
    assert {"inspect", "verify", "sample"} <= scripts
