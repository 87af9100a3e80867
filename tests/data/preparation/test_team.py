"""Teams of threads; whole processes are tested in test_prepare_text.py."""

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hg_scale.data import lock as lock_module
from hg_scale.data.errors import DataError
from hg_scale.data.lock import FolderLock
from hg_scale.data.preparation.place import Place, find_place
from hg_scale.data.preparation.team import Team, TeamStopped
from hg_scale.data.progress import ProgressBar


class Recorder(ProgressBar):
    """Remembers what was shown."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def update(self, done):
        super().update(done)
        self.shown.append(done)


def run_team(folder, size, work, patience=20.0, progress=None):
    """`work(team)` in a thread for each rank; what each returned or raised."""

    def member(rank):
        shown = progress if progress and rank == 0 else ProgressBar()
        try:
            with Team(Place(rank, size), folder, patience=patience, progress=shown) as team:
                return work(team)
        except DataError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(member, range(size)))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_work_is_shared_and_counted(tmp_path, size):
    progress = Recorder()
    together = threading.Barrier(size)

    def work(team):
        team.stage("first", 1000, 100)
        mine = []
        for item in team.share(range(30), lambda item: f"item-{item}"):
            mine.append(item)
            team.advance(30)
            time.sleep(0.001)
        team.barrier()
        together.wait(0.001 if size == 1 else 20)  # all are here, or this raises
        return mine

    shares = run_team(tmp_path, size, work, progress=progress)
    assert sorted(item for share in shares for item in share) == list(range(30))
    assert progress.shown[-1] == 100 + 30 * 30 and progress.shown == sorted(progress.shown)


def test_no_one_passes_a_barrier_alone(tmp_path):
    passed = []

    def work(team):
        for stage in range(4):
            time.sleep(0.02 * ((team.rank + stage) % 3))
            team.barrier()
            passed.append(stage)
            team.barrier()

    run_team(tmp_path, 3, work)
    assert passed == sorted(passed) and len(passed) == 12


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_one_failure_ends_all_with_its_message(tmp_path, failing):
    def work(team):
        if team.rank == failing:
            raise DataError("part-7.jsonl is broken")
        team.barrier()

    ended = run_team(tmp_path, 3, work)
    for rank, error in enumerate(ended):
        assert isinstance(error, TeamStopped) == (rank != failing)
        assert "part-7.jsonl is broken" in str(error)
        assert rank == failing or f"rank {failing} of 3" in str(error)


def test_a_failure_is_seen_in_the_middle_of_work(tmp_path):
    def work(team):
        team.stage("work", 10**9, 0)
        if team.rank == 1:
            raise DataError("no more room")
        while True:
            team.advance(1)
            time.sleep(0.001)

    assert all("no more room" in str(error) for error in run_team(tmp_path, 3, work))


@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_process_ends_the_others(tmp_path, silent):
    def work(team):
        if team.rank == silent:
            team._leave.set()  # as if killed: it beats no more
            time.sleep(4)
            return
        team.barrier()

    ended = run_team(tmp_path, 3, work, patience=2.0)
    others = [error for rank, error in enumerate(ended) if rank != silent]
    assert all(f"rank {silent} of 3 has shown no sign of life for 2 s" in str(e) for e in others)


def test_processes_that_do_not_come(tmp_path):
    def start(rank):
        team = Team(Place(rank, 3), tmp_path, patience=0.5, progress=ProgressBar())
        with pytest.raises(DataError) as caught, team:
            pass
        return str(caught.value)

    assert "rank 1, 2 of 3 has not come within 0.5 s" in start(0)
    assert "rank 0 has not come within 0.5 s" in start(2)


def test_two_of_one_rank_are_refused(tmp_path):
    def member(rank):
        try:
            with Team(Place(rank, 2), tmp_path, patience=20.0, progress=ProgressBar()) as team:
                team.barrier()
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(3) as pool:
        first, *others = pool.map(member, [0, 1, 1])
    assert first is None
    (message,) = filter(None, others)
    assert "another process is rank 1 of 2 already; each needs a rank of its own" in message


def test_sizes_that_differ_are_refused(tmp_path):
    def member(place):
        try:
            with Team(place, tmp_path, patience=4.0, progress=ProgressBar()):
                pass
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        first, _ = pool.map(member, [Place(0, 2), Place(1, 4)])
    assert "rank 1 counts 4 processes, rank 0 2" in first


def test_what_an_earlier_team_left_does_not_matter(tmp_path):
    def work(team):
        team.barrier()
        return list(team.share(range(2), lambda item: f"item-{item}"))

    for _ in range(3):
        (tmp_path / "team" / "claims").mkdir(parents=True, exist_ok=True)
        (tmp_path / "team" / "claims" / "item-0").touch()
        old = {"members": ["x", "y"], "beat": 3, "open": 9, "failed": "long ago"}
        (tmp_path / "team" / "pulse.json").write_text(json.dumps(old))
        stale = {"nonce": "y", "size": 2, "beat": 1, "done": [0], "barriers": 9, "failed": "old",
                 "left": False}  # fmt: skip
        (tmp_path / "team" / "rank-1.json").write_text(json.dumps(stale))

        shares = run_team(tmp_path, 2, work)
        assert sorted(item for share in shares for item in share) == [0, 1]


def test_one_owner(tmp_path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    with pytest.raises(DataError, match=rf"process {os.getpid()} on .* is writing there; wait"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    second.release()


def test_a_killed_owner_does_not_stand_in_the_way(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from hg_scale.data.lock import FolderLock;"
        f"FolderLock(Path({str(tmp_path)!r})).acquire(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    assert (tmp_path / "owner.json").exists()
    start = time.monotonic()
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert time.monotonic() - start < 5  # it was not watched: the kernel knows
    lock.release()


@pytest.mark.parametrize("alive", [True, False])
def test_an_owner_on_another_host(tmp_path, monkeypatch, alive):
    monkeypatch.setattr(lock_module, "_WATCH", 1.5)
    monkeypatch.setattr(lock_module, "BEAT", 0.2)
    monkeypatch.setattr(lock_module.fcntl, "flock", lambda *_: None)  # not carried between hosts
    owner = {"host": "n7", "kernel": "other", "pid": 1, "nonce": "n", "since": "noon", "beat": 0}
    stop = threading.Event()

    def beat():
        while not stop.wait(0.05):
            owner["beat"] += 1
            (tmp_path / "partial").write_text(json.dumps(owner))
            (tmp_path / "partial").replace(tmp_path / "owner.json")

    (tmp_path / "owner.json").write_text(json.dumps(owner))
    thread = threading.Thread(target=beat)
    if alive:
        thread.start()
    lock = FolderLock(tmp_path)
    try:
        if alive:
            with pytest.raises(DataError, match="process 1 on n7, since noon, is writing there"):
                lock.acquire()
        else:
            lock.acquire()
            (tmp_path / "owner.json").write_text(json.dumps(owner))
            with pytest.raises(DataError, match="process 1 on n7"):  # it was taken over
                lock.beat()
    finally:
        stop.set()
        if alive:
            thread.join()


SLURM = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("variables", "rank", "size"),
    [
        ({}, 0, 1),
        (SLURM, 2, 4),
        ({**SLURM, "SLURM_JOB_ID": "9", "SLURM_STEP_ID": "0"}, 2, 4),
        ({**SLURM, "SLURM_JOB_ID": "9"}, 0, 1),  # in a batch script
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, 0, 1),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"}, 1, 3),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "9"}, 1, 2),
    ],
)  # fmt: skip
def test_places(monkeypatch, variables, rank, size):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # no MPI: the variables alone
    assert find_place() == Place(rank, size)


def test_mpi_is_not_loaded_without_a_launcher():
    code = (
        "import sys; from hg_scale.data.preparation.place import find_place; find_place();"
        "sys.exit('mpi4py' in sys.modules)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "PMI"))}
    assert subprocess.run([sys.executable, "-c", code], env=clean, timeout=60).returncode == 0
