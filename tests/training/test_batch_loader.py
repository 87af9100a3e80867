"""Batches and validation in several processes: an error on one rank ends all ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hg_scale.config.load import parse_config
from hg_scale.config.read import merge
from hg_scale.data.index import Index
from hg_scale.errors import UserError
from tests.data.conftest import prepare
from tests.world import Worlds

TREE: dict[str, Any] = {
    "model": {
        "hierarchy": "1@1 1@2 1@1",
        "d_model": 32,
        "heads": 2,
        "d_ff": 64,
        "vocab_size": 256,
        "sequence_length": 64,
        "pooling": "average",
        "upsampling": "repeat",
    },
    "training": {"global_batch_size": 8, "precision": "fp32", "validation_windows": 8},
    "data": {"retries": 0},
}
STEPS = 12


@pytest.fixture
def corpus(tmp_path: Path) -> Index:
    """12 shards of 1,000 tokens, two members each; 1,000 tokens to validate on."""
    source = tmp_path / "text"
    source.write_bytes(np.random.default_rng(6).bytes(13_000))
    return prepare(source, tmp_path / "shards", split=(12_000, 1_000, 0), shard_tokens=1_000)


def config_of(corpus: Index, tensor: int = 1, pipeline: int = 1, **data: Any) -> dict[str, Any]:
    parallel = {"tensor": tensor, "pipeline": pipeline, "zero_stage": 1}
    return merge(TREE, {"parallel": parallel, "data": {"path": corpus.location, **data}})


def load_batches(
    tree: dict[str, Any], steps: int, state: dict[str, Any] | None = None
) -> dict[str, Any]:
    """This rank's batches, the error that stopped it, and its state for a checkpoint."""
    import torch.distributed as dist

    from hg_scale.parallel.mesh import make_mesh
    from hg_scale.training.batch_loader import BatchLoader
    from hg_scale.training.corpora import open_sources

    config = parse_config(tree, world_size=dist.get_world_size())
    mesh, _ = make_mesh(config.parallel)
    sources, warnings, loaded, failure = open_sources(config), [], [], None
    device = torch.device("cpu")
    with BatchLoader(
        config, sources, mesh, device, steps=steps, state=state, warn=warnings.append
    ) as loader:
        try:
            for _ in range(steps):
                batch = loader.next()
                loaded.append(None if batch is None else batch.tolist())
        except UserError as error:
            failure = type(error).__name__, str(error)
        waits = loader.waits()
        return {
            "data_rank": mesh.data_rank,
            "batches": loaded,
            "error": failure,
            "warnings": warnings,
            "state": json.loads(json.dumps(loader.state())),
            "waits": waits,
            "position": loader.position,
        }


def global_batches(ranks: list[dict[str, Any]]) -> np.ndarray:
    """(steps, batch, L + 1); all ranks with the same data rank must have the same."""
    by_rank: dict[int, Any] = {}
    for rank in ranks:
        if None not in rank["batches"]:
            assert by_rank.setdefault(rank["data_rank"], rank["batches"]) == rank["batches"]
    return np.concatenate([np.array(by_rank[r]) for r in sorted(by_rank)], 1)


# world size, tensor, pipeline
LAYOUTS = [(2, 1, 1), (2, 2, 1), (4, 1, 2), (4, 1, 1)]


@pytest.mark.parametrize(("size", "tensor", "pipeline"), LAYOUTS)
def test_corrupt_shard_stops_all_ranks(
    worlds: Worlds, corpus: Index, size: int, tensor: int, pipeline: int
) -> None:
    """After the same batches; exactly one rank reports the error."""
    tree = config_of(corpus, tensor, pipeline)
    intact = global_batches(worlds.run(size, load_batches, tree, STEPS))
    path = Path(corpus.location, "train-00004.tar")
    path.write_bytes(path.read_bytes()[:900])
    ranks = worlds.run(size, load_batches, tree, STEPS)
    errors = [rank["error"] for rank in ranks]
    reported = [text for kind, text in errors if kind == "DataError"]
    assert len(reported) == 1 and "train-00004.tar: cannot be read at member" in reported[0]
    assert sorted(kind for kind, _ in errors)[1:] == ["StoppedByPeer"] * (size - 1)
    (count,) = {len(rank["batches"]) for rank in ranks}
    assert 0 < count < STEPS
    assert np.array_equal(global_batches(ranks), intact[:count])


@pytest.mark.parametrize(("size", "tensor", "pipeline"), [(1, 1, 1), *LAYOUTS])
def test_skipped_sequences_are_masked_and_recorded_on_all_ranks(
    worlds: Worlds, corpus: Index, size: int, tensor: int, pipeline: int
) -> None:
    tree = config_of(corpus, tensor, pipeline, on_fault="skip")
    intact = global_batches(worlds.run(1, load_batches, config_of(corpus), STEPS))
    path = Path(corpus.location, "train-00004.tar")
    content = bytearray(path.read_bytes())
    content[-1500] ^= 1  # in its second member
    path.write_bytes(content)
    ranks = worlds.run(size, load_batches, tree, STEPS)
    found = global_batches(ranks)
    masked = (found == -1).all(2)
    assert np.array_equal(masked, (found == -1).any(2)) and masked.any()
    assert np.array_equal(found[~masked], intact[~masked])
    assert {rank["error"] for rank in ranks} == {None}
    for rank in ranks:
        assert rank["state"] == ranks[0]["state"]
        assert rank["position"] == STEPS * 8 * 64
    skipped = ranks[0]["state"]["skipped"]
    assert {shard for _, shard in skipped} == {"shards/train-00004.tar"}
    assert len({sequence for sequence, _ in skipped}) == len(skipped) == masked.sum()
    assert {sequence // 8 for sequence, _ in skipped} == set(np.flatnonzero(masked.any(1)).tolist())
    warnings = {message for rank in ranks for message in rank["warnings"] if "skipped" in message}
    assert len(warnings) == 1
    assert "train-00004.tar: member 1: the checksum differs" in warnings.pop()
    # A run resumed in another layout keeps the list.
    again = worlds.run(2, load_batches, config_of(corpus, on_fault="skip"), 2, ranks[0]["state"])
    assert again[0]["state"]["skipped"][: len(skipped)] == skipped


def load_batches_with_a_bug(tree: dict[str, Any]) -> dict[str, Any]:
    """As `load_batches`, with a reader on rank 1 that raises an unexpected exception."""
    import torch.distributed as dist

    from hg_scale.data.shards import ShardReader

    def load(self: ShardReader, start: int, stop: int) -> None:
        raise RuntimeError("unexpected\nsecond line")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(ShardReader, "load", load)
        return load_batches(tree, STEPS)


def test_bug_on_one_rank_ends_all_ranks(worlds: Worlds, corpus: Index) -> None:
    """No rank is left waiting in the all-reduce; the failing rank prints the traceback."""
    ranks = worlds.run(2, load_batches_with_a_bug, config_of(corpus))
    assert ranks[0]["error"][0] == "StoppedByPeer"
    kind, text = ranks[1]["error"]
    assert kind == "DataError" and "(RuntimeError: unexpected)" in text
    assert "Traceback" in ranks[1]["warnings"][-1] and "in load" in ranks[1]["warnings"][-1]


def load_batches_with_two_warnings(tree: dict[str, Any]) -> dict[str, Any]:
    from hg_scale.training import batch_loader

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_loader, "_MAX_REPORTED", 2)
        return load_batches(tree, STEPS)


def test_number_of_warnings_is_limited(worlds: Worlds, corpus: Index) -> None:
    for number in range(5):
        Path(corpus.location, f"train-{number:05d}.tar").unlink()
    tree = config_of(corpus, on_fault="skip", max_skipped=100)
    (found,) = worlds.run(1, load_batches_with_two_warnings, tree)
    warnings = [message for message in found["warnings"] if "skipped" in message]
    assert len(warnings) == 2 and warnings[-1].endswith("further errors are only counted")
    assert found["error"] is None and len(found["state"]["skipped"]) > 20


def test_too_many_skipped_sequences_stop_all_ranks(worlds: Worlds, corpus: Index) -> None:
    Path(corpus.location, "train-00001.tar").unlink()
    Path(corpus.location, "train-00002.tar").unlink()
    ranks = worlds.run(2, load_batches, config_of(corpus, on_fault="skip", max_skipped=3), STEPS)
    kind, text = ranks[0]["error"]
    assert kind == "DataError" and "more than data.max_skipped 3" in text
    assert "train-0000" in text and ranks[1]["error"][0] == "StoppedByPeer"


def test_low_coverage_of_the_data_is_warned_of(
    worlds: Worlds, corpus: Index, tmp_path: Path
) -> None:
    """For 12 shards of 1,000 tokens, and not for one of 12,000."""
    (warning,) = worlds.run(2, load_batches, config_of(corpus), 1)[0]["warnings"]
    assert f"shards: an epoch serves {12 * 14 * 64 / 12_000:.1%} of its training tok" in warning
    tree = merge(config_of(corpus), {"model": {"sequence_length": 512}})
    (warning,) = worlds.run(1, load_batches, tree, 1)[0]["warnings"]
    assert "serves 51.2% of its training tokens in sequences of 512" in warning
    large = prepare(
        tmp_path / "text", tmp_path / "large", split=(12_000, 1_000, 0), shard_tokens=12_000
    )
    assert worlds.run(1, load_batches, config_of(large), 1)[0]["warnings"] == []


def test_slowest_rank_is_named(worlds: Worlds, corpus: Index) -> None:
    ranks = worlds.run(2, load_batches, config_of(corpus), STEPS)
    assert ranks[0]["waits"] == ranks[1]["waits"]
    assert ranks[0]["waits"].keys() == {"data_wait_p50", "data_wait_p99", "data_wait_rank"}
    assert 0 <= ranks[0]["waits"]["data_wait_p50"] <= ranks[0]["waits"]["data_wait_p99"]


def validate(tree: dict[str, Any]) -> tuple[Any, int]:
    """The error of a validation, and the number of labels on this rank."""
    import torch.distributed as dist

    from hg_scale.parallel.mesh import make_mesh
    from hg_scale.training.corpora import open_sources
    from hg_scale.training.validation import Validator

    config = parse_config(tree, world_size=dist.get_world_size())
    mesh, _ = make_mesh(config.parallel)
    validator = Validator(config, open_sources(config), mesh, torch.device("cpu"), "validation")
    labels = 0
    for batch in validator.batches(validator.parts[0]):
        assert batch is not None
        labels += int((batch[1] >= 0).sum())
    try:
        validator.settle()
    except UserError as error:
        return (type(error).__name__, str(error)), labels
    return None, labels


def test_corrupt_validation_shard_stops_all_ranks(worlds: Worlds, corpus: Index) -> None:
    """After the validation: until then the rank yields batches without labels."""
    assert [count for _, count in worlds.run(2, validate, config_of(corpus))] == [256, 256]
    path = Path(corpus.location, "validation-00000.tar")
    content = bytearray(path.read_bytes())
    content[corpus.splits["validation"].shards[0].members.offsets[0] + 800] ^= 1
    path.write_bytes(content)
    errors = [error for error, _ in worlds.run(2, validate, config_of(corpus))]
    assert "validation-00000.tar: member 0" in errors[0][1]
    assert errors[1] is not None


def test_too_few_sequences_are_refused_at_the_start(worlds: Worlds, corpus: Index) -> None:
    from hg_scale.config.errors import ConfigError

    source = {"path": corpus.location, "when_exhausted": "retire"}
    tree = merge(TREE, {"data": {"sources": [source]}})
    sequences = 12 * (1000 // 64 - 1)
    assert len(worlds.run(1, load_batches, tree, sequences // 8)[0]["batches"]) == sequences // 8
    with pytest.raises(AssertionError, match=f"{ConfigError.__name__}.*|retire"):
        worlds.run(1, load_batches, tree, sequences // 8 + 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"tokenizer": "sentencepiece"}, "was made with bytes"),
        ({"sources": "twice"}, "are the same data"),
        ({"path": "nowhere/at/all"}, "no such folder"),
    ],
)
def test_unsuitable_data_is_refused(corpus: Index, data: dict[str, Any], message: str) -> None:
    from hg_scale.config.errors import ConfigError
    from hg_scale.training.corpora import open_sources

    if data.get("sources") == "twice":
        paths = [corpus.location, f"pipe:cat {corpus.location}/{{}}"]
        data = {"path": None, "sources": [{"path": p, "name": p} for p in paths]}
    with pytest.raises(ConfigError, match=message):
        open_sources(parse_config(merge(config_of(corpus), {"data": data})))


def test_validation_loss_is_the_weighted_mean_of_the_sources(corpus: Index, tmp_path: Path) -> None:
    from hg_scale.parallel.mesh import Mesh
    from hg_scale.training.corpora import bytes_per_token, open_sources
    from hg_scale.training.validation import Validator

    (tmp_path / "other").write_bytes(bytes(range(200)) * 40)
    other = prepare(tmp_path / "other", tmp_path / "more", split=(7_000, 500, 500))
    sources = [
        {"path": corpus.location, "weight": 3.0},
        {"path": other.location, "weight": 1.0},
    ]
    config = parse_config(merge(TREE, {"data": {"sources": sources}}))
    data = open_sources(config)
    validator = Validator(config, data, Mesh(0, 1, 1, 1), torch.device("cpu"), "validation")
    assert [part.tokens for part in validator.parts] == [512, 500]
    record = validator.record([512 * 4.0, 500 * 2.0])
    assert record["validation_loss"] == pytest.approx(3.5)
    assert record["validation_loss_by_source"] == {"shards": 4.0, "more": 2.0}
    assert record["validation_bits_per_byte"] == pytest.approx(3.5 / np.log(2))
    assert bytes_per_token(data) == 1.0
