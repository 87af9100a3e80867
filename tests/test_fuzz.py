"""Every reader of files takes changed files: its result or one line of error, in bounded memory.

`make fuzz` runs each reader on 10,000 inputs, `make test` on a few hundred.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hg_scale.checkpoint.checksum import ComputeChecksum
from hg_scale.checkpoint.find import find_latest, verify_checksums, verify_sizes
from hg_scale.checkpoint.load import CheckpointReader
from hg_scale.checkpoint.manifest import MANIFEST, seal
from hg_scale.checkpoint.mapped_safetensors import MappedSafetensors, header_problem
from hg_scale.config.load import load_config, parse_config
from hg_scale.convert.deepspeed_files import ConsolidatedSource, UniversalSource, load_pickle
from hg_scale.convert.export_source import ExportSource
from hg_scale.convert.reference import GoldenSource
from hg_scale.data.index import read_index
from hg_scale.data.sequence_schedule import parse_data_state
from hg_scale.data.tokenizer import SentencePieceTokenizer
from hg_scale.errors import UserError
from hg_scale.evaluation.report.run_folder import read_runs
from hg_scale.folder_lock import FolderLock
from hg_scale.model.hourglass import parameter_shapes
from hg_scale.run_starts import read_starts
from hg_scale.training.failures import error_of_peer
from hg_scale.training.metrics import MetricsLog
from hg_scale.training.monitoring.heartbeat import read_heartbeats
from hg_scale.training.monitoring.run_end import read_run_end
from hg_scale.training.monitoring.status import read_status
from tests.mutations import changed_bytes, changed_json
from tests.run_folders import write_run
from tests.runs import TINY

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))
LIMIT = 200_000_000  # bytes
MODEL = parse_config(
    {"model": {"hierarchy": "1@1", "d_model": 8, "heads": 1, "d_ff": 8, "vocab_size": 8}}
).model

Fuzz = Callable[[st.SearchStrategy[bytes], Callable[[], Any], Path], None]


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Fail if the block allocates more than LIMIT bytes at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < LIMIT
    finally:
        tracemalloc.stop()


def fuzz(contents: st.SearchStrategy[bytes], read: Callable[[], Any], path: Path) -> None:
    """Read changed contents of `path`: an error has one line and is a UserError."""

    @settings(
        max_examples=EXAMPLES, database=None, derandomize=EXAMPLES < 1000,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(contents)
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with bounded_memory():
            try:
                read()
            except UserError as error:
                line = str(error)
                assert len(line) < 4000
                assert "configuration: " in line or "\n" not in line, line

    before = path.read_bytes() if path.exists() else b""
    try:
        check()
    finally:
        path.write_bytes(before)  # other tests read the same folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of two parameters in one rank file."""
    from hg_scale.checkpoint.fragments import KINDS, Fragment, Slice
    from hg_scale.checkpoint.safetensors_file import create_safetensors
    from tests.manifests import meta

    path = tmp_path_factory.mktemp("run") / "checkpoints" / "step-00000003"
    path.mkdir(parents=True)
    sizes = {"a": (2, 3), "b": (4,)}
    tensors = [
        (f"{n}.{kind}", (int(np.prod(shape)),))
        for kind in KINDS
        for n, shape in enumerate(sizes.values())
    ]
    create_safetensors(path / "rank-00000.safetensors", tensors)
    fragments = [
        Fragment(Slice(name, shape), 0, int(np.prod(shape))).to_json()
        for name, shape in sizes.items()
    ]
    file = path / "rank-00000.safetensors"
    entry = {
        "name": file.name, "bytes": file.stat().st_size, "fragments": fragments,
        "checksum": ComputeChecksum(path)(file.name),
    }  # fmt: skip
    manifest = {"format_version": 2, "step": 3, **meta(3), "tokenizer": None, "files": [entry]}
    (path / MANIFEST).write_text(json.dumps(seal(manifest)))
    assert verify_checksums(path) is None
    return path


def read_all(path: Path) -> None:
    """Read a checkpoint as training, --check, verify and status do."""
    find_latest(path.parent)
    verify_checksums(path)
    reader = CheckpointReader(path)
    for name in reader.shapes:
        reader.full_tensor(name)


def test_manifests(checkpoint: Path) -> None:
    file = checkpoint / MANIFEST
    manifest = json.loads(file.read_text())

    def sealed(content: bytes) -> bytes:
        try:
            tree = json.loads(content)
            return json.dumps(
                seal({k: v for k, v in tree.items() if k != "manifest_checksum"})
            ).encode()
        except (ValueError, AttributeError, RecursionError):
            return content

    fuzz(changed_json(manifest).map(sealed), lambda: read_all(checkpoint), file)


def test_rank_files(checkpoint: Path) -> None:
    file = checkpoint / "rank-00000.safetensors"
    entry = json.loads((checkpoint / MANIFEST).read_text())["files"][0]
    content = file.read_bytes()
    length = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:length])

    def with_header(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + content[length:]

    def read() -> None:
        header_problem(checkpoint, entry)
        MappedSafetensors(file).tensor("1.fp32", 4)

    changed = st.one_of(changed_json(header).map(with_header), changed_bytes(content))
    fuzz(changed, read, file)


def test_state_of_the_data() -> None:
    state = {
        "sequence_length": 8, "mixture": [["x", 1.0, True]], "windows": 3, "served": {"x": 3},
        "before": {"y": [[8, 4]]}, "tokenizer": {}, "skipped": [],
    }  # fmt: skip

    @settings(max_examples=EXAMPLES, database=None, suppress_health_check=list(HealthCheck))
    @given(changed_json(state))
    def check(content: bytes) -> None:
        try:
            tree = json.loads(content)
            if isinstance(tree, dict):
                parse_data_state(tree).histories()
        except (UserError, ValueError, RecursionError):
            pass

    check()


def test_indexes(corpus: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    file = folder / "index.json"

    def read() -> None:
        index = read_index(folder)
        index.image_shape, index.identity, index.vocab_size  # noqa: B018
        for split in index.splits.values():
            for shard in split.shards:
                shard.document_ends()
        index.open_tokenizer()

    fuzz(changed_json(json.loads(file.read_text())), read, file)


def test_configurations(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    fuzz(changed_json(TINY), lambda: load_config(file), file)


def exported(folder: Path) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    weights = {name: torch.zeros(shape) for name, shape in parameter_shapes(MODEL).items()}
    save_file(weights, folder / "model.safetensors")
    config = {
        "model": MODEL.model_dump(), "precision": "fp32", "step": 3, "images": [2, 2, 1],
        "tokenizer": {"name": "bytes", "vocab_size": 256, "eod": None, "sha256": None},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_exports(tmp_path: Path) -> None:
    folder = exported(tmp_path / "export")
    config, weights = folder / "config.json", folder / "model.safetensors"

    def read() -> None:
        source = ExportSource(folder)
        source.full_tensor(next(iter(source.shapes)))
        source.close()

    read()
    fuzz(changed_json(json.loads(config.read_text())), read, config)
    fuzz(changed_bytes(weights.read_bytes()), read, weights)
    names = json.dumps({"weight_map": dict.fromkeys(parameter_shapes(MODEL), weights.name)})
    index = folder / "model.safetensors.index.json"
    index.write_text(names)
    fuzz(changed_json(json.loads(names)), read, index)


def test_files_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    weights = {name: torch.zeros(shape) for name, shape in parameter_shapes(MODEL).items()}
    torch.save({"module": weights}, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in entries if name.endswith("data.pkl"))

    def with_pickle(data: bytes) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, value in entries.items():
                archive.writestr(name, data if name == pickled else value)
        return buffer.getvalue()

    def read() -> None:
        source = ConsolidatedSource(path, MODEL)
        source.full_tensor(next(iter(source.shapes)))

    read()
    changed = changed_bytes(entries[pickled]).map(with_pickle)
    fuzz(st.one_of(changed, changed, changed_bytes(content)), read, path)


def test_golden_files(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, config=np.array('{"d_model": 8}'), a=np.zeros(3))
    fuzz(changed_bytes(path.read_bytes()), lambda: GoldenSource(path), path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with every file that `status` and `report` read."""
    run = write_run(tmp_path_factory.mktemp("runs") / "run", logged=3)
    (run / "ranks").mkdir()
    beat = {
        "rank": 0, "world_size": 1, "host": "h", "pid": 1, "time": 1e9, "step": 3, "phase": "step",
        "work": "", "turns": 0, "since": 1e9, "step_seconds": 0.5,
    }  # fmt: skip
    row = {"rank": 0, "ratio": 1.5, "data_seconds": 1.0, "forward_seconds": 1.0}
    contents = {
        "ranks/rank-00000.json": beat,
        "ranks/rank-00000.end": {"code": 1, "line": "lost"},
        "ranks/stragglers.json": {"step": 3, "threshold": 1.2, "ranks": [row]},
        "jobs.jsonl": {"time": 1e9, "job": "7", "start": 1, "event": "start", "log": "log"},
        "watchdog.jsonl": {"time": 1e9, "line": "rank 0 hangs"},
        "starts.jsonl": {"start": 1, "time": 1e9, "step": 0, "ranks": 1, "job": "7"},
        "end.json": {"code": 0, "line": "step 3 of 3 saved", "time": 1e9},
    }
    for name, tree in contents.items():
        (run / name).write_text(json.dumps(tree) + "\n")
    return run


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl", "jobs.jsonl", "watchdog.jsonl", "config.json", "ranks/rank-00000.json",
        "ranks/rank-00000.end", "ranks/stragglers.json", "starts.jsonl", "end.json",
    ],
)  # fmt: skip
def test_files_of_a_run(run: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hg_scale.training.monitoring.status.queue_state", lambda job: None)
    path = run / name
    last = json.loads(path.read_text().splitlines()[-1])

    def read() -> None:
        read_status(run, 1e9 + 10)
        read_heartbeats(run)
        error_of_peer(run, 1, 2, timeout=0)
        read_run_end(run), read_starts(run)  # noqa: B018
        if name in ("metrics.jsonl", "config.json"):
            for found in read_runs([run]):
                found.column("loss"), found.validation_column("validation_loss"), found.state  # noqa: B018
                found.step, found.steps, found.scored_tokens  # noqa: B018
        if name == "metrics.jsonl":
            MetricsLog(run, 2).close()

    fuzz(changed_json(last), read, path)


def test_owners_of_a_folder(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path, "in use", "wait")
    owner = {"host": "h", "kernel": "k", "pid": 1, "nonce": "n", "since": "s", "beat": 3}
    path = tmp_path / "owner.json"
    fuzz(changed_json(owner), lambda: lock._taken_by(lock._read()), path)


NAMED_PIPES: dict[str, Callable[[Path], Any]] = {
    MANIFEST: lambda path: verify_sizes(path.parent),
    "model.pt": load_pickle,
    "index.json": lambda path: read_index(path.parent),
    "a.json": load_config,
    "tokenizer.model": lambda path: SentencePieceTokenizer.read(path, documents=True),
    "a.safetensors": MappedSafetensors,
    "a.npz": GoldenSource,
    "config.json": lambda path: ExportSource(path.parent),
    "latest_universal": lambda path: UniversalSource(path.parent),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", NAMED_PIPES)
def test_named_pipe_is_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    try:
        message = str(NAMED_PIPES[name](tmp_path / name))
    except UserError as error:
        message = str(error)
    assert "expected a regular file, found a named pipe" in message


def test_state_dict_that_holds_itself_is_refused(tmp_path: Path) -> None:
    tree: dict[str, Any] = {}
    tree["m"] = tree
    torch.save(tree, tmp_path / "a.bin")
    with pytest.raises(UserError, match="expected a state dict .* found an object"):
        ConsolidatedSource(tmp_path / "a.bin", MODEL)
