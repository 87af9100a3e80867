"""`slurm/selftest.sh` with two processes on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import launcher, log_of

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]


def test_all_checks_pass_and_the_table_is_printed(
    cluster: Cluster, job_environment: dict[str, str], elsewhere: Path
) -> None:
    words = ("--gres=gpu:2", "--cpus-per-task=2", launcher("selftest.sh"), "--processes", "2")
    job = cluster.submit(*words, folder=elsewhere, environment=job_environment)
    state = cluster.wait(job, 800)
    log = log_of(elsewhere)
    assert state["JobState"] == "COMPLETED", log
    table = log.partition("| check | layout | result |")[2]
    assert table.count("| same curve | ") == 4 and "FAILED" not in table
    assert "TP1 x PP2 x DP1, ZeRO 1" in table and "ZeRO 3" in table
    assert "killed after step" in table and "GB/s" in table
