"""Ranks that do not train the same run end with one line that names what differs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from hg_scale.config.load import parse_config
from hg_scale.training.same_run import code_digest, describe_differences, require_same_run
from tests.world import Worlds

Difference = tuple[dict[str, Any], str, dict[str, Any], dict[str, str]]


def compare(folder: Path, changed: Difference) -> tuple[str, str, int]:
    """Rank 1 has the changed configuration, folder, options and environment."""
    tree, name, options, environment = changed if dist.get_rank() == 1 else ({}, "run", {}, {})
    with mock.patch.dict(os.environ, environment):
        try:
            require_same_run(parse_config(tree), folder / name, {"stop_at": None} | options)
        except Exception as error:
            return type(error).__name__, str(error), getattr(error, "exit_code", -1)
    return "", "", 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (({"optimizer": {"learning_rate": 0.05}}, "run", {}, {}),
         "optimizer.learning_rate is 0.0004 on ranks 0, 2 and 0.05 on rank 1;"),
        (({"training": {"seed": 9}}, "run", {}, {}), "training.seed is 1 on ranks 0, 2 and 9 on"),
        (({}, "other", {}, {}), "/run on ranks 0, 2 and "),
        (({}, "run", {"stop_at": 3}, {}), "--stop-at is None on ranks 0, 2 and 3 on rank 1;"),
        (({}, "run", {}, {"TORCHELASTIC_RUN_ID": "b"}),
         "TORCHELASTIC_RUN_ID is not set on ranks 0, 2 and b on rank 1;"),
    ],
)  # fmt: skip
def test_a_difference_ends_all_ranks(
    worlds: Worlds, tmp_path: Path, changed: Difference, message: str
) -> None:
    first, *others = worlds.run(3, compare, tmp_path, changed)
    assert first[0] == "DifferentRuns" and first[2] == 2
    assert message in first[1] and "\n" not in first[1]
    assert {name for name, _, _ in others} == {"StoppedByPeer"}


def test_equal_ranks_pass(worlds: Worlds, tmp_path: Path) -> None:
    assert worlds.run(3, compare, tmp_path, ({}, "run", {}, {})) == [("", "", 0)] * 3


def test_many_differences_are_counted() -> None:
    ranks = [{f"key{n}": str(rank) for n in range(6)} for rank in (0, 1, 1)]
    text = describe_differences(ranks)
    assert text.startswith("key0 is 0 on rank 0 and 1 on ranks 1, 2; key1 is")
    assert text.endswith("; and 2 more")


def test_the_digest_of_the_code_changes_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with mock.patch("hg_scale.__file__", str(tmp_path / "__init__.py")):
        before = code_digest.__wrapped__()
        (tmp_path / "a.py").write_text("x = 2\n")
        assert code_digest.__wrapped__() != before
