"""Types of options: local paths are local."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from hg_scale.arguments import local_path
from hg_scale.commands.main import main
from tests.shared import ROOT


@pytest.mark.parametrize(
    "text", ["s3://a/b", "S3://a", "gs:/a/b", "hf://datasets/x", "https://a", "file:///tmp/a",
             "file:/tmp/a", "hdfs://a", "abfss://c@a", "new-scheme+x://a"],
)  # fmt: skip
def test_urls_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is a URL; expected a local path: "):
        local_path(text)


@pytest.mark.parametrize("text", ["a", "/a/b", "./s3:/a", "12:30.txt", "a:b", "x/http://a", "s3:"])
def test_paths_are_paths(text: str) -> None:
    assert local_path(text) == Path(text)


def test_every_option_that_is_a_path_refuses_urls() -> None:
    """None has the type `Path`, which makes a folder `s3:` of a URL."""
    sources = [*(ROOT / "hg_scale").rglob("*.py"), *(ROOT / "data_prep").glob("*.py")]
    assert not [path for path in sources if re.search(r"type=Path\b", path.read_text())]


@pytest.mark.parametrize(
    "arguments",
    [["report", "run", "--output"], ["convert", "export", "run"],
     ["train", "--config", "a", "--run"], ["evaluate", "run", "--json"], ["generate"], ["status"],
     ["convert", "average", "a", "--out"]],
)  # fmt: skip
def test_verbs_refuse_urls(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "s3://bucket/x"])
    assert ended.value.code == 2 and "'s3://bucket/x' is a URL" in capsys.readouterr().err
