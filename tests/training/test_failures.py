"""What becomes of a run of which one rank is gone, and why: real processes, that may die."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from hg_scale.checkpoint.find import find_latest
from hg_scale.exit_codes import FAILED, GAVE_UP, LOST, REQUEUE
from hg_scale.parallel.launch import Launch
from hg_scale.training import failures
from hg_scale.training.failures import (
    LostRank,
    RankEnd,
    as_user_error,
    clear_end,
    error_of_peer,
    write_end,
)
from hg_scale.training.interruption import Interruption, StopSignals
from tests.faults.worlds import MODULES
from tests.forks import KILLED, Forks, finish
from tests.runs import records, train_here
from tests.training.test_interruption import Words, words
from tests.world import Worlds


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    yield Forks("tests.training.test_failures", *MODULES)


def train_and_meet(fault: str, arguments: Words, output: Path) -> None:
    """Train; the last rank meets something after step 3. Ends as `train.py` does."""
    import hg_scale.checkpoint.save as saving
    from hg_scale.train import leave
    from hg_scale.training import loop

    concerned = dist.get_rank() == dist.get_world_size() - 1

    def meet(*_: Any) -> Any:
        if fault == "bug":
            raise KeyError("no such thing")
        os.kill(os.getpid(), signal.SIGKILL)

    class Timer(loop.StepTimer):
        steps = 0

        def count_step(self, tokens: int) -> None:
            super().count_step(tokens)
            self.steps += 1
            if concerned and self.steps == 3:
                if fault == "killed in the last save":
                    os.kill(os.getpid(), signal.SIGUSR1)
                else:
                    meet()

    write = meet if concerned and fault == "killed in the last save" else saving.write_rank_file
    with (
        mock.patch.object(loop, "StepTimer", Timer),
        mock.patch.object(saving, "write_rank_file", write),
    ):
        try:
            code = train_here(arguments, output)
        except Exception:
            code = FAILED
    leave(code)


@pytest.mark.parametrize(
    ("fault", "codes"),
    [
        ("killed", [LOST, LOST, KILLED]),
        ("bug", [FAILED] * 3),
        ("killed in the last save", [LOST, LOST, KILLED]),
    ],
)
def test_a_rank_is_gone(
    forks: Forks, config: Path, tmp_path: Path, fault: str, codes: list[int]
) -> None:
    """The others end by themselves: to be started again, but not after a fault of its own."""
    run, output = tmp_path / "run", tmp_path / "told"
    sets = ["training.global_batch_size=6", "checkpoint.async=false", "checkpoint.every=2"]
    if fault == "killed in the last save":
        sets[1:] = ["checkpoint.async=true", "checkpoint.every=0"]
    arguments = words(config, run, *sets)
    ended = finish(forks.start(3, train_and_meet, fault, arguments, output))
    told = [output.with_name(f"told-{rank}").read_text() for rank in range(3)]
    assert ended == codes, told
    assert [r["step"] for r in records(run) if "loss" in r][:2] == [1, 2]
    found = find_latest(run / "checkpoints")
    assert (found and found.name) == ("step-00000002" if "every=2" in sets[-1] else None)
    if fault == "bug":
        assert "KeyError: 'no such thing'" in (run / "logs" / "rank-2.log").read_text()
        assert json.loads((run / "ranks" / "rank-00002.end").read_text())["code"] == FAILED
        assert told[0].splitlines()[-1] == (
            "rank 2 ended by itself, and all with it: KeyError: 'no such thing'"
        )
        assert "ended by itself" not in told[1]
        return
    for rank in range(2):
        last = told[rank].splitlines()[-1]
        assert last.startswith(f"rank {rank} lost its connection to the others at step ")
        assert last.endswith("; the job is to be started again")
        assert "Traceback" not in told[rank] and "gloo/" not in told[rank]
        assert "Traceback" in (run / "logs" / f"rank-{rank}.log").read_text()


def ends_when_connections_close(arguments: Words, output: Path, run: Path) -> tuple[int, list]:
    """The exit code, and the faults that were written down by the time the group is taken down."""
    from hg_scale.training import run as module

    found: list[RankEnd | None] = []
    close = dist.destroy_process_group

    def look() -> None:
        found.append(error_of_peer(run, rank=1, world_size=2, patience=0))
        close()

    with mock.patch.object(module.dist, "destroy_process_group", look):
        return train_here(arguments, output), found


def test_a_fault_is_written_down_before_the_others_can_miss_this_rank(
    worlds: Worlds, config: Path, tmp_path: Path
) -> None:
    """They look for it when the connection breaks, and not for long."""
    run = tmp_path / "run"
    arguments = words(config, run, "data.path=pipe:false {}", "data.retries=0")
    ((code, (end,)),) = worlds.run(
        1, ends_when_connections_close, arguments, tmp_path / "told", run
    )
    assert code == FAILED and end.code == FAILED and "index.json" in end.line


@pytest.mark.parametrize("kind", [RuntimeError, getattr(torch, "AcceleratorError", RuntimeError)])
def test_what_is_a_lost_gpu(kind: type[RuntimeError]) -> None:
    def told(words: str, step: int | None = 6) -> object:
        interruption = Interruption(StopSignals())
        interruption.step = step
        try:
            raise kind(f"CUDA error: {words}\nCUDA kernel errors might be asynchronously reported")
        except RuntimeError as error:
            return as_user_error(error, Launch(3, 8, 3), interruption)

    fault = told("uncorrectable ECC error encountered")
    assert isinstance(fault, LostRank) and fault.exit_code == LOST
    assert str(fault) == (
        f"rank 3 lost its GPU on {socket.gethostname()} at step 7: CUDA error: uncorrectable ECC "
        "error encountered; the job is to be started again"
    )
    assert "at the start: " in str(told("CUDA-capable device(s) is/are busy or unavailable", None))
    for of_the_code in ("an illegal memory access was encountered", "device-side assert triggered"):
        assert told(of_the_code) is None


def test_ends_are_written_found_and_forgotten(tmp_path: Path) -> None:
    assert error_of_peer(tmp_path, 0, 4, patience=0) is None
    write_end(tmp_path, 1, REQUEUE, "saved")
    write_end(tmp_path, 2, GAVE_UP, "enough")
    write_end(tmp_path, 7, FAILED, "of a larger world")
    assert error_of_peer(tmp_path, 0, 4, patience=0) == RankEnd(2, GAVE_UP, "enough")
    assert error_of_peer(tmp_path, 2, 4, patience=0) is None  # one's own is known
    (tmp_path / "ranks" / "rank-00003.end").write_text("{")
    clear_end(tmp_path, 2)
    clear_end(tmp_path, 2)
    assert error_of_peer(tmp_path, 0, 4, patience=0) is None
    with mock.patch.object(failures.os, "replace", side_effect=OSError):
        write_end(tmp_path, 1, FAILED, "lost on a full disk")
    assert error_of_peer(tmp_path, 0, 4, patience=0) is None
