"""How the other ranks end when one rank dies or fails, in real processes."""

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
from hg_scale.training.failures import (
    LostRank,
    RankEnd,
    as_user_error,
    error_of_peer,
    find_ends,
    write_end,
)
from hg_scale.training.interruption import Interruption, StopSignals
from hg_scale.training.monitoring.heartbeat import clear_ranks
from tests.faults.worlds import MODULES
from tests.forks import KILLED, Forks, finish
from tests.runs import arguments, records, run_train
from tests.world import Worlds


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    yield Forks("tests.training.test_failures", *MODULES)


def train_and_fail(how: str, command_line: list[str], output: Path) -> None:
    """Train; the last rank fails after step 3. Ends as `train.py` does."""
    import hg_scale.checkpoint.save as saving
    from hg_scale.train import exit_process
    from hg_scale.training import loop

    fails = dist.get_rank() == dist.get_world_size() - 1

    def fail(*_: Any) -> Any:
        if how == "bug":
            raise KeyError("no such thing")
        os.kill(os.getpid(), signal.SIGKILL)

    class Timer(loop.StepTimer):
        steps = 0

        def count_step(self, tokens: int) -> None:
            super().count_step(tokens)
            self.steps += 1
            if fails and self.steps == 3:
                if how == "killed in the last save":
                    os.kill(os.getpid(), signal.SIGUSR1)
                else:
                    fail()

    write = fail if fails and how == "killed in the last save" else saving.write_rank_file
    with (
        mock.patch.object(loop, "StepTimer", Timer),
        mock.patch.object(saving, "write_rank_file", write),
    ):
        try:
            code = run_train(command_line, output)
        except Exception:
            code = FAILED
    exit_process(code)


@pytest.mark.parametrize(
    ("how", "codes"),
    [
        ("killed", [LOST, LOST, KILLED]),
        ("bug", [FAILED] * 3),
        ("killed in the last save", [LOST, LOST, KILLED]),
    ],
)
def test_all_ranks_end_when_one_fails(
    forks: Forks, config: Path, tmp_path: Path, how: str, codes: list[int]
) -> None:
    """With the exit code to be started again if the rank died, and without it after a bug."""
    run, output = tmp_path / "run", tmp_path / "terminal"
    sets = ["training.global_batch_size=6", "checkpoint.async=false", "checkpoint.every=2"]
    if how == "killed in the last save":
        sets[1:] = ["checkpoint.async=true", "checkpoint.every=0"]
    processes = forks.start(3, train_and_fail, how, arguments(config, run, *sets), output)
    ended = finish(processes)
    terminals = [output.with_name(f"terminal-{rank}").read_text() for rank in range(3)]
    assert ended == codes, terminals
    assert [r["step"] for r in records(run) if "loss" in r][:2] == [1, 2]
    found = find_latest(run / "checkpoints")
    assert (found and found.name) == ("step-00000002" if "every=2" in sets[-1] else None)
    if how == "bug":
        assert "KeyError: 'no such thing'" in (run / "logs" / "rank-2.log").read_text()
        assert json.loads((run / "ranks" / "rank-00002.end").read_text())["code"] == FAILED
        last_line = terminals[0].splitlines()[-1]
        assert last_line == "rank 2 failed and ended all ranks: KeyError: 'no such thing'"
        assert "failed and ended" not in terminals[1]
        return
    for rank, terminal in enumerate(terminals[:2]):
        last_line = terminal.splitlines()[-1]
        assert last_line.startswith(f"rank {rank} lost its connection to the others at step ")
        assert last_line.endswith("; the job is to be started again")
        assert "Traceback" not in terminal and "gloo/" not in terminal
        assert "Traceback" in (run / "logs" / f"rank-{rank}.log").read_text()


def ends_at_disconnect(command_line: list[str], output: Path, run: Path) -> tuple[int, list]:
    """The exit code, and the ends that are recorded when the process group is destroyed."""
    from hg_scale.training import run as module

    recorded: list[RankEnd | None] = []
    destroy = dist.destroy_process_group

    def record_and_destroy() -> None:
        recorded.append(error_of_peer(run, rank=1, world_size=2, timeout=0))
        destroy()

    with mock.patch.object(module.dist, "destroy_process_group", record_and_destroy):
        return run_train(command_line, output), recorded


def test_an_error_is_recorded_before_the_connections_close(
    worlds: Worlds, config: Path, tmp_path: Path
) -> None:
    """The other ranks look for the record when their connections break, and only for a while."""
    run, output = tmp_path / "run", tmp_path / "terminal"
    command_line = arguments(config, run, "data.path=pipe:false {}", "data.retries=0")
    ((code, (end,)),) = worlds.run(1, ends_at_disconnect, command_line, output, run)
    assert code == FAILED and end.code == FAILED and "index.json" in end.line


@pytest.mark.parametrize("kind", [RuntimeError, getattr(torch, "AcceleratorError", RuntimeError)])
def test_recognising_a_lost_gpu(kind: type[RuntimeError]) -> None:
    def reported(message: str, step: int | None = 6) -> object:
        interruption = Interruption(StopSignals())
        interruption.step = step
        text = f"CUDA error: {message}\nCUDA kernel errors might be asynchronously reported"
        try:
            raise kind(text)
        except RuntimeError as error:
            return as_user_error(error, Launch(3, 8, 3), interruption)

    lost = reported("uncorrectable ECC error encountered")
    assert isinstance(lost, LostRank) and lost.exit_code == LOST
    assert str(lost) == (
        f"rank 3 lost its GPU on {socket.gethostname()} at step 7: CUDA error: uncorrectable ECC "
        "error encountered; the job is to be started again"
    )
    busy = reported("CUDA-capable device(s) is/are busy or unavailable", None)
    assert "during start-up: " in str(busy)
    for bug in ("an illegal memory access was encountered", "device-side assert triggered"):
        assert reported(bug) is None


def test_end_files_are_written_found_and_cleared(tmp_path: Path) -> None:
    assert error_of_peer(tmp_path, 0, 4, timeout=0) is None
    write_end(tmp_path, 1, REQUEUE, "saved")
    write_end(tmp_path, 2, GAVE_UP, "enough")
    write_end(tmp_path, 7, FAILED, "rank of a larger world")
    assert error_of_peer(tmp_path, 0, 4, timeout=0) == RankEnd(2, GAVE_UP, "enough")
    assert error_of_peer(tmp_path, 2, 4, timeout=0) is None  # its own end
    (tmp_path / "ranks" / "rank-00003.end").write_text("{")
    earlier = find_ends(tmp_path)
    assert error_of_peer(tmp_path, 0, 4, timeout=0, earlier=earlier) is None
    write_end(tmp_path, 2, FAILED, "of this start")
    found = error_of_peer(tmp_path, 0, 4, timeout=0, earlier=earlier)
    assert found == RankEnd(2, FAILED, "of this start")
    clear_ranks(tmp_path)
    assert error_of_peer(tmp_path, 0, 4, timeout=0) is None
    with mock.patch("os.replace", side_effect=OSError):
        write_end(tmp_path, 1, FAILED, "lost on a full disk")
    assert error_of_peer(tmp_path, 0, 4, timeout=0) is None
