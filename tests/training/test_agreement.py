"""An error on one rank ends all ranks; none waits for a rank that has ended."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hg_scale.errors import UserError
from hg_scale.training.agreement import StoppedByPeer, run_on_all_ranks
from hg_scale.training.resume import agree_on_resume_point
from tests.world import Worlds

ERRORS = {
    "user": UserError("this is wrong"),
    "disk": OSError(5, "Input/output error", "a file"),
    "memory": MemoryError(),
    "bug": KeyError("files"),
}


def raise_on_rank_1(kind: str) -> tuple[str, str]:
    """Rank 1 has an error; the type and message of what is raised on this rank."""

    def action() -> int:
        if dist.get_rank() == 1:
            raise ERRORS[kind]
        return 3

    try:
        run_on_all_ranks(action, torch.device("cpu"))
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("kind", "raised"),
    [
        ("user", ("UserError", "this is wrong")),
        ("disk", ("UserError", "rank 1: [Errno 5] Input/output error: 'a file'")),
        ("memory", ("UserError", "rank 1: out of host memory")),
        ("bug", ("KeyError", "'files'")),
    ],
)
def test_an_error_of_one_rank_ends_all(worlds: Worlds, kind: str, raised: tuple[str, str]) -> None:
    others = (StoppedByPeer.__name__, "rank 1 reports an error")
    assert worlds.run(3, raise_on_rank_1, kind) == [others, raised, others]


def resume_with_unknown_error(folder: Path) -> str:
    """Verifying its share of a checkpoint raises an unexpected error on rank 1."""
    from unittest import mock

    from hg_scale.config.load import parse_config
    from hg_scale.training import resume
    from hg_scale.training.console import Console

    def broken(*_: object) -> str | None:
        raise ValueError("unheard of")

    config = parse_config({"checkpoint": {"start_from": str(folder)}})
    console = Console(1, rank=dist.get_rank(), stream=None)
    with (
        mock.patch.object(
            resume, "verify_checksums", broken if dist.get_rank() else lambda *_: None
        ),
        mock.patch.object(resume, "find_resume_checkpoint", lambda *_: folder),
    ):
        try:
            agree_on_resume_point(config, folder / "none", console, torch.device("cpu"))
        except Exception as error:
            return type(error).__name__
    return ""


def test_an_unexpected_error_in_verification_ends_all(worlds: Worlds, tmp_path: Path) -> None:
    from tests.checkpoint.test_retention import checkpoint

    ends = worlds.run(2, resume_with_unknown_error, checkpoint(tmp_path, 1))
    assert ends == ["StoppedByPeer", "ValueError"]
