"""Groups of threads as ranks; processes are tested in test_prepare_text.py."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.rank_group import OtherRankFailed, RankGroup
from hg_scale.data.progress import ProgressBar
from hg_scale.parallel.launch import Launch


class Recorder(ProgressBar):
    """Records the numbers of bytes that were shown."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def update(self, done):
        super().update(done)
        self.shown.append(done)


def run_group(folder, size, work, patience=20.0, progress=None):
    """Run `work(group)` in a thread per rank. Returns the result or the error of each rank."""

    def run_rank(rank):
        shown = progress if progress and rank == 0 else ProgressBar()
        try:
            with RankGroup(Launch(rank, size), folder, patience=patience, progress=shown) as group:
                return work(group)
        except DataError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run_rank, range(size)))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_work_is_shared_and_counted(tmp_path, size):
    progress = Recorder()
    all_ranks = threading.Barrier(size)

    def work(group):
        group.start_stage("first", 1000, 100)
        own = []
        for item in group.claim_items(range(30), lambda item: f"item-{item}"):
            own.append(item)
            group.advance(30)
            time.sleep(0.001)
        group.barrier()
        all_ranks.wait(0.001 if size == 1 else 20)  # raises unless all ranks passed the barrier
        return own

    shares = run_group(tmp_path, size, work, progress=progress)
    assert sorted(item for share in shares for item in share) == list(range(30))
    assert progress.shown[-1] == 100 + 30 * 30 and progress.shown == sorted(progress.shown)


def test_no_rank_passes_a_barrier_alone(tmp_path):
    passed = []

    def work(group):
        for stage in range(4):
            time.sleep(0.02 * ((group.rank + stage) % 3))
            group.barrier()
            passed.append(stage)
            group.barrier()

    run_group(tmp_path, 3, work)
    assert passed == sorted(passed) and len(passed) == 12


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_one_failure_ends_all_ranks_with_its_message(tmp_path, failing):
    def work(group):
        if group.rank == failing:
            raise DataError("part-7.jsonl is corrupt")
        group.barrier()

    errors = run_group(tmp_path, 3, work)
    for rank, error in enumerate(errors):
        assert isinstance(error, OtherRankFailed) == (rank != failing)
        assert "part-7.jsonl is corrupt" in str(error)
        assert rank == failing or f"rank {failing} of 3" in str(error)


def test_a_failure_is_noticed_during_work(tmp_path):
    def work(group):
        group.start_stage("work", 10**9, 0)
        if group.rank == 1:
            raise DataError("no space left")
        while True:
            group.advance(1)
            time.sleep(0.001)

    assert all("no space left" in str(error) for error in run_group(tmp_path, 3, work))


@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_without_a_sign_of_life_ends_the_others(tmp_path, silent):
    def work(group):
        if group.rank == silent:
            group._thread.stop()  # as if it were killed
            time.sleep(4)
            return
        group.barrier()

    errors = run_group(tmp_path, 3, work, patience=2.0)
    others = [error for rank, error in enumerate(errors) if rank != silent]
    assert all(f"rank {silent} of 3 has shown no sign of life for 2 s" in str(e) for e in others)


def test_missing_ranks_are_reported(tmp_path):
    def start(rank):
        group = RankGroup(Launch(rank, 3), tmp_path, patience=0.5, progress=ProgressBar())
        with pytest.raises(DataError) as caught, group:
            pass
        return str(caught.value)

    assert "rank 1, 2 of 3 has not joined within 0.5 s" in start(0)
    assert "rank 0 has not joined within 0.5 s" in start(2)


def test_two_processes_with_one_rank_are_refused(tmp_path):
    def run_rank(rank):
        try:
            with RankGroup(
                Launch(rank, 2), tmp_path, patience=20.0, progress=ProgressBar()
            ) as group:
                group.barrier()
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(run_rank, [0, 1, 1])
    assert first is None
    (message,) = filter(None, others)
    assert "another process is rank 1 of 2 already; each needs a rank of its own" in message


def test_different_world_sizes_are_refused(tmp_path):
    def run_rank(launch):
        try:
            with RankGroup(launch, tmp_path, patience=4.0, progress=ProgressBar()):
                pass
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        first, _ = pool.map(run_rank, [Launch(0, 2), Launch(1, 4)])
    assert "rank 1 counts 4 processes, rank 0 2" in first


def test_files_of_an_earlier_group_are_ignored(tmp_path):
    def work(group):
        group.barrier()
        return list(group.claim_items(range(2), lambda item: f"item-{item}"))

    for _ in range(3):
        (tmp_path / "ranks" / "claims").mkdir(parents=True, exist_ok=True)
        (tmp_path / "ranks" / "claims" / "item-0").touch()
        old = {"members": ["x", "y"], "beat": 3, "open": 9, "failed": "long ago"}
        (tmp_path / "ranks" / "rank-0.json").write_text(json.dumps(old))
        stale = {"nonce": "y", "size": 2, "beat": 1, "done": [0], "barriers": 9, "failed": "old",
                 "left": False}  # fmt: skip
        (tmp_path / "ranks" / "rank-1.json").write_text(json.dumps(stale))

        shares = run_group(tmp_path, 2, work)
        assert sorted(item for share in shares for item in share) == [0, 1]
