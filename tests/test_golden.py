"""The model equals the reference implementation, unsharded and in tensor-parallel slices.

Uses the published golden files if they are available, and always new ones in their format, made by
a second implementation of their specification (`reference_model.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hg_scale.checkpoint.errors import CheckpointError
from tests import golden
from tests.golden import BOUND, differences
from tests.reference_model import Case, Reference, make_file, stored_weights
from tests.shared import ROOT, SHARED, shared
from tests.world import Worlds

ATTEND, REPEAT = "attention+avg", "attention+repeat"
CASES = {
    "flat": Case("3@1", None, None, length=19, vocab=33, batch=3),
    "one position": Case("1@1 1@1 1@1", ATTEND, REPEAT, length=1, batch=1),
    "three levels": Case("1@1 1@2 2@4 1@12 2@4 1@2 1@1", ATTEND, REPEAT),
    "three levels, linear": Case("1@1 1@2 1@4 1@8 1@4 1@2 1@1", "linear", "linear", length=32),
    "three levels, attention": Case(
        "1@1 1@2 1@4 1@8 1@4 1@2 1@1", "attention+linear", "attention+linear", length=16
    ),
    "unequal ends": Case("3@1 2@3 1@1", ATTEND, REPEAT),
    "empty stacks": Case("0@1 0@2 1@4 0@2 2@1", ATTEND, REPEAT),
    "no block at all": Case("0@1 0@2 0@1", ATTEND, REPEAT),
    "attention+linear down": Case("1@1 1@3 1@1", "attention+linear", "repeat"),
    "attention+linear up": Case("1@1 1@3 1@1", "avg", "attention+linear"),
    "attention+none": Case("1@1 1@2 1@6 1@2 1@1", ATTEND, "attention+none"),
    "linear to attention+none": Case("1@1 1@4 1@1", "linear", "attention+none"),
    "linear to repeat": Case("1@1 1@2 1@4 1@2 1@1", "linear", "repeat"),
    "average to linear": Case("1@1 1@2 1@4 1@2 1@1", "avg", "linear"),
    "k = 1": Case("1@1 1@1 1@1", ATTEND, REPEAT, length=17),
    "k = 1 inside": Case("1@1 1@2 1@2 1@2 1@1", ATTEND, REPEAT),
    "k = 1 above": Case("1@1 1@1 1@3 1@1 1@1", "attention+linear", "attention+linear"),
    "one head": Case("1@1 1@4 1@1", ATTEND, REPEAT, heads=1),
    "two heads, odd vocabulary": Case("1@1 1@4 1@1", ATTEND, REPEAT, heads=2, vocab=97),
    "eight heads, wider": Case(
        "1@1 2@4 1@1", ATTEND, REPEAT, heads=8, d_model=64, d_ff=96, vocab=257, length=48
    ),
}
"""Lengths are multiples of the total factor: the format has no others."""
SHARDABLE = [name for name, case in CASES.items() if case.heads % 2 == 0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make a file of each case."""
    folder = tmp_path_factory.mktemp("golden")
    return {
        name: make_file(folder / f"{number}.npz", case, seed=number)
        for number, (name, case) in enumerate(CASES.items())
    }


def assert_within(worst: float, first: str) -> None:
    assert worst <= BOUND and not first, f"{worst:.2e} {first}"


def test_second_implementation_equals_the_published_files() -> None:
    """It computes every logit and activation from their weights, so its new files are valid."""
    files = sorted(shared("golden").glob("*.npz"))
    assert len(files) >= 5
    for path in files:
        file = np.load(path, allow_pickle=False)
        reference = Reference(Case.of(str(file["config"])), stored_weights(file))
        computed = {"output/logits": reference.run(file["input/tokens_shifted"])}
        computed |= reference.activations
        assert computed.keys() == {k for k in file.files if k.startswith(("act/", "output/"))}
        for name, value in computed.items():
            np.testing.assert_allclose(value, file[name], rtol=0, atol=BOUND, err_msg=name)


def test_published_files() -> None:
    for file in sorted(shared("golden").glob("*.npz")):
        assert_within(*differences(file))


@pytest.mark.parametrize("name", CASES)
def test_new_files(made: dict[str, Path], name: str) -> None:
    assert_within(*differences(made[name]))


def compare_sharded(paths: list[Path], bad: list[Path]) -> tuple[list[tuple[float, str]], int]:
    """Return the differences of files, sharded over this world, and how many bad ones fail."""
    import torch.distributed as dist

    from hg_scale.parallel import megatron

    megatron.initialize_groups(dist.get_world_size(), 1)
    layers = megatron.MegatronLayers()
    return [differences(path, layers) for path in paths], golden.compare(bad, layers)


def test_new_files_in_tensor_parallel_slices(
    worlds: Worlds, made: dict[str, Path], tmp_path: Path
) -> None:
    """And no rank hangs if a file differs, cannot be sharded, or is missing."""
    off = changed(made["flat"], tmp_path, nudge("head/bias"))
    bad = [off, made["one head"], tmp_path / "missing"]
    for results, failed in worlds.run(2, compare_sharded, [made[name] for name in SHARDABLE], bad):
        for result in results:
            assert_within(*result)
        assert failed == len(bad)


def command(monkeypatch: pytest.MonkeyPatch, *files: Path, tensor: int = 1) -> int:
    """Run the command in this process; return its exit code."""
    arguments = ["golden.py", *map(str, files), "--tensor-parallel", str(tensor)]
    monkeypatch.setattr(sys, "argv", arguments)
    return golden.main()


def changed(path: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Copy a file with changed entries."""
    with np.load(path) as file:
        entries: dict[str, Any] = dict(file)
    change(entries)
    copy = folder / f"changed-{len(list(folder.iterdir()))}.npz"
    np.savez(copy, **entries)
    return copy


def nudge(name: str) -> Callable[[dict[str, Any]], None]:
    """Return a change of one weight, by 1/64 up and down."""

    def change(entries: dict[str, Any]) -> None:
        value = entries[f"weight/{name}"]
        signs = np.where(np.arange(value.size) % 3, 1, -1).reshape(value.shape)
        entries[f"weight/{name}"] = (value + signs / 64).astype(np.float32)

    return change


def set_config(**keys: Any) -> Callable[[dict[str, Any]], None]:
    """Return a change of the `config` entry; None removes a key."""

    def change(entries: dict[str, Any]) -> None:
        config = {**json.loads(str(entries["config"])), **keys}
        config = {key: value for key, value in config.items() if value is not None}
        entries["config"] = np.array(json.dumps(config))

    return change


def test_command_names_the_first_activation_that_differs(
    made: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """For a change of a weight at any level."""
    good = made["three levels"]
    expected = {
        "embed/table": "embed",
        "pre/0/ff1/bias": "pre",
        "level0/pre/0/attn/q/kernel": "level0/pre",
        "level1/shorten/base_norm/bias": "level1/shorten",
        "level2/stack/final_norm/scale": "level2/stack",
        "level1/upsample/attn/v/bias": "level1/upsample",
        "level0/upsample_norm/bias": "level0/out",
        "post/0/ff2/kernel": "post",
    }
    bad = [changed(good, tmp_path, nudge(name)) for name in (*expected, "head/bias")]
    assert command(monkeypatch, good, *bad, good) == 1
    first, *lines, logits, last = capsys.readouterr().out.splitlines()
    assert first.endswith("  ok") and last == first
    for line, name in zip(lines, expected.values(), strict=True):
        assert (
            "EXCEEDS THE BOUND 1e-05" in line
            and f"first activation that differs: {name} by" in line
        )
    assert logits.endswith("EXCEEDS THE BOUND 1e-05  no activation differs")
    assert command(monkeypatch, good, made["k = 1"]) == 0


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda entries: entries.pop(name)


def put(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda entries: entries.update({name: np.array(value)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("config"), "not a golden file: has no config"),
        (drop("output/logits"), "has no output/logits"),
        (put("config", "flat"), "config: expected a JSON object, got 'flat'"),
        (put("config", "[1]"), "config: expected a JSON object"),
        (set_config(heads=None), "config: has no 'heads'"),
        (set_config(heads=3), "model.heads = 3: 3 heads do not divide d_model 32"),
        (set_config(hierarchy="1@1 1@3 1@2"), "model.hierarchy = .*factor 1"),
        (set_config(hierarchy=3), "model.hierarchy = 3: expected a valid string"),
        (set_config(pooling="max"), "pooling is 'max', expected one of 'avg', 'linear', 'atten"),
        (set_config(upsampling=None), "upsampling is None, expected one of 'repeat', 'linear'"),
        (set_config(activation="gelu"), "activation is 'gelu', expected 'gelu_tanh'"),
        (set_config(vocab=32), r"input/tokens_shifted: expected ids from 0 to 31"),
        (set_config(vocab=128), r"output/logits: expected \(2, 24, 128\)"),
        (set_config(d_ff=65), r"weight/pre/0/ff1/kernel is .*\(32, 64\), expected .*\(32, 65\)"),
        (drop("weight/post/0/attn/pos/bias"), "weight/post/0/attn/pos/bias is missing"),
        (put("weight/post/1/ff1/bias", [1.0]), "weight/post/1/ff1/bias: .* has no such parameter"),
        (put("weight/pos_bias_u", [1.0]), r"weight/pos_bias_u is .*\(1,\), expected .*\(4, 8\)"),
        (put("weight/embed/table", [["1"]]), r"embed/table is <U1 \(1, 1\), expected numbers"),
        (put("output/logits", np.full((2, 24, 64), "1")), "output/logits: expected numbers"),
        (put("input/tokens_shifted", [[0.5]]), r"expected ids \(B, L\), got float64 \(1, 1\)"),
        (put("act/post", [1.0]), r"act/post: expected numbers \(2, 24, 32\), got float64 \(1,\)"),
    ],
)
def test_error_names_the_invalid_entry(
    made: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = changed(made["attention+linear up"], tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        differences(path)
    assert "\n" not in str(caught.value)


def test_other_files_are_reported_in_one_line(
    made: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = made["k = 1"]
    texts = {"empty": b"", "text": b"hello", "half": good.read_bytes()[:2000]}
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "pickle.npz", config=np.array({"a": object()}))
    method = bytearray(good.read_bytes())
    method[method.index(b"PK\1\2") + 10] = 99  # of compression, in the zip's directory
    (tmp_path / "method").write_bytes(method)
    missing, one_head = tmp_path / "missing", made["one head"]
    others = [tmp_path, *sorted(tmp_path.iterdir())]
    assert command(monkeypatch, missing, *others, good) == 1
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first == f"{missing}: cannot be read: No such file or directory"
    assert len(lines) == len(others) and last.endswith("  ok")
    assert "cannot be read" in lines[0]  # a folder
    assert all("not a golden file: expected numpy's .npz" in line for line in lines[1:])
    with pytest.raises(CheckpointError, match="model.heads = 1: must be a multiple of parallel"):
        golden.read_golden(one_head, tensor=2)


def test_command_under_tensor_parallelism(made: dict[str, Path]) -> None:
    published = sorted((SHARED / "golden").glob("*.npz"))
    files = [str(made["three levels"]), *map(str, published)]
    command = [sys.executable, "tests/golden.py", *files, "--tensor-parallel", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    assert [line.endswith("  ok") for line in done.stdout.splitlines()] == [True] * len(files)
