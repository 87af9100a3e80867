"""`train.py` in several processes with a corrupt shard: all ranks end, with one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hg_scale.config.read import merge
from hg_scale.data.index import Index
from tests.data.conftest import prepare
from tests.ports import free_port
from tests.training.test_batch_loader import TREE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """16 training shards of 1,000 tokens, the fifth of them with a flipped bit."""
    folder = tmp_path_factory.mktemp("corrupt")
    (folder / "text").write_bytes(np.random.default_rng(8).bytes(17_000))
    split = (16_000, 1_000, 0)
    index = prepare(folder / "text", folder / "shards", split=split, shard_tokens=1_000)
    path = folder / "shards" / "train-00004.tar"
    content = bytearray(path.read_bytes())
    content[index.splits["train"].shards[4].members.offsets[1] + 700] ^= 1
    path.write_bytes(content)
    return index


def start(
    size: int, run: Path, tree: dict[str, Any], nodes: list[Path] | None = None
) -> list[tuple[int, str, str]]:
    """Run `size` processes of one run; return (exit code, stdout, stderr) of each.

    `nodes`: every process is on a node of its own, with this working directory.
    """
    config = run.with_suffix(".json")
    config.write_text(json.dumps(tree))
    port = free_port()
    command = [sys.executable, str(ROOT / "hg_scale" / "train.py"), "--config", str(config)]
    processes = []
    for rank in range(size):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        environment |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": str(ROOT),
        }
        if nodes:
            environment |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        processes.append(
            subprocess.Popen(
                [*command, "--run", str(run)], cwd=nodes[rank] if nodes else None,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
            )
        )  # fmt: skip
    try:
        done = [process.communicate(timeout=240) for process in processes]
        return [(p.returncode, *texts) for p, texts in zip(processes, done, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("size", "pipeline", "workers"), [(2, 1, 1), (4, 2, 0)], ids=["2 processes", "4 processes"]
)
def test_corrupt_shard_ends_all_processes_with_one_line(
    corpus: Index, tmp_path: Path, size: int, pipeline: int, workers: int
) -> None:
    tree = merge(TREE, {
        "parallel": {"pipeline": pipeline},
        "training": {"steps": 20},
        "data": {"path": corpus.location, "workers": workers},
        "logging": {"every": 1},
    })  # fmt: skip
    ended = start(size, tmp_path / "run", tree)
    assert [code for code, *_ in ended] == [1] * size
    lines = [line for *_, errors in ended for line in errors.splitlines()]
    assert len(lines) == 1, lines
    assert "train-00004.tar: member 1: the checksum differs" in lines[0]
    steps = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert 0 < len(steps) < 20


@pytest.mark.parametrize("without", [0, 1])
def test_node_without_the_data_ends_all_processes(
    corpus: Index, tmp_path: Path, without: int
) -> None:
    """Its end file has the exit code of a user error, so the job is not requeued."""
    tree = merge(TREE, {"training": {"steps": 20}, "data": {"path": "shards"}})
    folders, run = [Path(corpus.location).parent] * 2, tmp_path / "run"
    folders[without] = tmp_path
    ended = start(2, run, tree, folders)
    assert ended[without][0] == 2 and ended[1 - without][0] in (1, 2), ended
    lines = [line for *_, errors in ended for line in errors.splitlines() if "data.path" in line]
    assert len(lines) == 1 and 'data.path = "shards": no such folder' in lines[0], ended
    end = json.loads((run / "ranks" / f"rank-{without:05}.end").read_text())
    assert end["code"] == 2


def test_corrupt_shard_is_skipped_and_recorded(corpus: Index, tmp_path: Path) -> None:
    """Two processes with two workers each."""
    tree = merge(TREE, {
        "training": {"steps": 20},
        "data": {"path": corpus.location, "workers": 2, "on_fault": "skip"},
        "logging": {"every": 1},
    })  # fmt: skip
    run = tmp_path / "run"
    ended = start(2, run, tree)
    assert [code for code, *_ in ended] == [0, 0], ended
    warnings = [
        line for _, output, _ in ended for line in output.splitlines() if "are skipped" in line
    ]
    assert len(warnings) == 1 and "train-00004.tar: member 1" in warnings[0]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    # Random bytes cannot be learned: ln 256 = 5.55, also where one window of 8 does not count.
    assert len(steps) == 20 and all(5.3 < record["loss"] < 7 for record in steps)
    assert {"data_wait_p50", "data_wait_p99", "data_wait_rank", "epochs"} <= steps[0].keys()
    (manifest,) = (run / "checkpoints").glob("step-*/manifest.json")
    progress = json.loads(manifest.read_text())["progress"]
    skipped = progress["data"]["skipped"]
    assert len(skipped) == steps[-1]["skipped_windows"] > 0
    assert progress["position"] == 20 * 8 * 64 == progress["data"]["windows"] * 64
