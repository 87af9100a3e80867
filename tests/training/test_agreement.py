"""Whatever one rank meets, the others end with it and wait for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hg_scale.errors import UserError
from hg_scale.training.agreement import StoppedByPeer, run_on_all_ranks
from hg_scale.training.resume import agree_on_resume_point
from tests.world import Worlds

FAULTS = {
    "user": UserError("this is wrong"),
    "disk": OSError(5, "Input/output error", "a file"),
    "memory": MemoryError(),
    "bug": KeyError("files"),
}


def meet(kind: str) -> tuple[str, str]:
    """Rank 1 meets a fault: what is raised here."""

    def action() -> int:
        if dist.get_rank() == 1:
            raise FAULTS[kind]
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
def test_a_fault_of_one_rank_ends_all(worlds: Worlds, kind: str, raised: tuple[str, str]) -> None:
    others = (StoppedByPeer.__name__, "rank 1 reports an error")
    assert worlds.run(3, meet, kind) == [others, raised, others]


def begin_badly(folder: Path) -> str:
    """Reading its part fails on rank 1, in a way that nobody has thought of."""
    from unittest import mock

    from hg_scale.config.load import parse_config
    from hg_scale.training import resume
    from hg_scale.training.console import Console

    def broken(*_: object) -> str | None:
        raise ValueError("unheard of")

    config = parse_config({"checkpoint": {"start_from": str(folder)}})
    console = Console(1, rank=dist.get_rank(), stream=None)
    with (
        mock.patch.object(resume, "content_damage", broken if dist.get_rank() else lambda *_: None),
        mock.patch.object(resume, "find_resume_checkpoint", lambda *_: folder),
    ):
        try:
            agree_on_resume_point(config, folder / "none", console, torch.device("cpu"))
        except Exception as error:
            return type(error).__name__
    return ""


def test_checking_that_fails_on_one_rank(worlds: Worlds, tmp_path: Path) -> None:
    from tests.checkpoint.test_retention import checkpoint

    assert worlds.run(2, begin_badly, checkpoint(tmp_path, 1)) == ["StoppedByPeer", "ValueError"]
