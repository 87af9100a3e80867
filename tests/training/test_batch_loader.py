"""Batches in worlds of processes: one rank's fault is every rank's."""

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


def serve(tree: dict[str, Any], steps: int, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """This rank's batches, what stopped it, and what it would write into a checkpoint."""
    import torch.distributed as dist

    from hg_scale.parallel.mesh import make_mesh
    from hg_scale.training.batch_loader import BatchLoader
    from hg_scale.training.corpora import open_sources

    config = parse_config(tree, world_size=dist.get_world_size())
    mesh, _ = make_mesh(config.parallel)
    sources, warnings, served, fault = open_sources(config), [], [], None
    device = torch.device("cpu")
    with BatchLoader(
        config, sources, mesh, device, steps=steps, state=state, warn=warnings.append
    ) as batches:
        try:
            for _ in range(steps):
                batch = batches.next()
                served.append(None if batch is None else batch.tolist())
        except UserError as error:
            fault = type(error).__name__, str(error)
        waits = batches.waits()
        return {
            "data_rank": mesh.data_rank,
            "served": served,
            "fault": fault,
            "warnings": warnings,
            "state": json.loads(json.dumps(batches.state())),
            "waits": waits,
            "position": batches.position,
        }


def global_batches(ranks: list[dict[str, Any]]) -> np.ndarray:
    """(steps, rows, L + 1), once all ranks of a data rank are seen to have the same."""
    by_rank: dict[int, Any] = {}
    for rank in ranks:
        if None not in rank["served"]:
            assert by_rank.setdefault(rank["data_rank"], rank["served"]) == rank["served"]
    return np.concatenate([np.array(by_rank[r]) for r in sorted(by_rank)], 1)


# world size, tensor, pipeline
LAYOUTS = [(2, 1, 1), (2, 2, 1), (4, 1, 2), (4, 1, 1)]


@pytest.mark.parametrize(("size", "tensor", "pipeline"), LAYOUTS)
def test_one_broken_shard_stops_all_ranks(
    worlds: Worlds, corpus: Index, size: int, tensor: int, pipeline: int
) -> None:
    """After the same batches; one of those that met it tells it, and the others do not."""
    tree = config_of(corpus, tensor, pipeline)
    whole = global_batches(worlds.run(size, serve, tree, STEPS))
    path = Path(corpus.location, "train-00004.tar")
    path.write_bytes(path.read_bytes()[:900])
    ranks = worlds.run(size, serve, tree, STEPS)
    faults = [rank["fault"] for rank in ranks]
    told = [text for kind, text in faults if kind == "DataError"]
    assert len(told) == 1 and "train-00004.tar: cannot be read at member" in told[0]
    assert sorted(kind for kind, _ in faults)[1:] == ["Stopped"] * (size - 1)
    (count,) = {len(rank["served"]) for rank in ranks}
    assert 0 < count < STEPS
    assert np.array_equal(global_batches(ranks), whole[:count])


@pytest.mark.parametrize(("size", "tensor", "pipeline"), [(1, 1, 1), *LAYOUTS])
def test_a_skip_masks_and_is_written_down_alike_everywhere(
    worlds: Worlds, corpus: Index, size: int, tensor: int, pipeline: int
) -> None:
    tree = config_of(corpus, tensor, pipeline, on_fault="skip")
    whole = global_batches(worlds.run(1, serve, config_of(corpus), STEPS))
    path = Path(corpus.location, "train-00004.tar")
    content = bytearray(path.read_bytes())
    content[-1500] ^= 1  # in its second member
    path.write_bytes(content)
    ranks = worlds.run(size, serve, tree, STEPS)
    found = global_batches(ranks)
    masked = (found == -1).all(2)
    assert np.array_equal(masked, (found == -1).any(2)) and masked.any()
    assert np.array_equal(found[~masked], whole[~masked])
    assert {rank["fault"] for rank in ranks} == {None}
    for rank in ranks:
        assert rank["state"] == ranks[0]["state"]
        assert rank["position"] == STEPS * 8 * 64
    ledger = ranks[0]["state"]["skipped"]
    assert {shard for _, shard in ledger} == {"shards/train-00004.tar"}
    assert len({window for window, _ in ledger}) == len(ledger) == masked.sum()
    assert {window // 8 for window, _ in ledger} == set(np.flatnonzero(masked.any(1)).tolist())
    told = {message for rank in ranks for message in rank["warnings"] if "skipped" in message}
    assert len(told) == 1 and "train-00004.tar: member 1: the checksum differs" in told.pop()
    # The ledger goes on in a run resumed from there, on another layout.
    again = worlds.run(2, serve, config_of(corpus, on_fault="skip"), 2, ranks[0]["state"])
    assert again[0]["state"]["skipped"][: len(ledger)] == ledger


def serve_with_a_bug(tree: dict[str, Any]) -> dict[str, Any]:
    """As `serve`, where reading fails on rank 1 as no bad data makes it fail."""
    import torch.distributed as dist

    from hg_scale.data.shards import ShardReader

    def load(self: ShardReader, start: int, stop: int) -> None:
        raise RuntimeError("not as planned\nat all")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(ShardReader, "load", load)
        return serve(tree, STEPS)


def test_a_bug_on_one_rank_ends_all(worlds: Worlds, corpus: Index) -> None:
    """None is left waiting in the exchange; the traceback is shown where it happened."""
    ranks = worlds.run(2, serve_with_a_bug, config_of(corpus))
    assert ranks[0]["fault"][0] == "Stopped"
    kind, text = ranks[1]["fault"]
    assert kind == "DataError" and "(RuntimeError: not as planned)" in text
    assert "Traceback" in ranks[1]["warnings"][-1] and "in load" in ranks[1]["warnings"][-1]


def serve_and_tell_two(tree: dict[str, Any]) -> dict[str, Any]:
    from hg_scale.training import batch_loader

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_loader, "_TOLD", 2)
        return serve(tree, STEPS)


def test_no_more_faults_are_told_than_one_reads(worlds: Worlds, corpus: Index) -> None:
    for number in range(5):
        Path(corpus.location, f"train-{number:05d}.tar").unlink()
    tree = config_of(corpus, on_fault="skip", max_skipped=100)
    (found,) = worlds.run(1, serve_and_tell_two, tree)
    told = [message for message in found["warnings"] if "skipped" in message]
    assert len(told) == 2 and told[-1].endswith("further ones are counted only")
    assert found["fault"] is None and len(found["state"]["skipped"]) > 20


def test_too_many_skips_stop_all_ranks(worlds: Worlds, corpus: Index) -> None:
    Path(corpus.location, "train-00001.tar").unlink()
    Path(corpus.location, "train-00002.tar").unlink()
    ranks = worlds.run(2, serve, config_of(corpus, on_fault="skip", max_skipped=3), STEPS)
    kind, text = ranks[0]["fault"]
    assert kind == "DataError" and "more than data.max_skipped 3" in text
    assert "train-0000" in text and ranks[1]["fault"][0] == "Stopped"


def test_tokens_left_out_are_told(worlds: Worlds, corpus: Index, tmp_path: Path) -> None:
    """Of 12 shards of 1,000 tokens; of one of 12,000 few enough stay out to say nothing."""
    (warning,) = worlds.run(2, serve, config_of(corpus), 1)[0]["warnings"]
    assert f"shards: an epoch serves {12 * 14 * 64 / 12_000:.1%} of its training tok" in warning
    tree = merge(config_of(corpus), {"model": {"sequence_length": 512}})
    (warning,) = worlds.run(1, serve, tree, 1)[0]["warnings"]
    assert "serves 51.2% of its training tokens in windows of 512" in warning
    large = prepare(
        tmp_path / "text", tmp_path / "large", split=(12_000, 1_000, 0), shard_tokens=12_000
    )
    assert worlds.run(1, serve, config_of(large), 1)[0]["warnings"] == []


def test_the_worst_rank_is_named(worlds: Worlds, corpus: Index) -> None:
    ranks = worlds.run(2, serve, config_of(corpus), STEPS)
    assert ranks[0]["waits"] == ranks[1]["waits"]
    assert ranks[0]["waits"].keys() == {"data_wait_p50", "data_wait_p99", "data_wait_rank"}
    assert 0 <= ranks[0]["waits"]["data_wait_p50"] <= ranks[0]["waits"]["data_wait_p99"]


def validate(tree: dict[str, Any]) -> tuple[Any, float]:
    import torch.distributed as dist

    from hg_scale.parallel.mesh import make_mesh
    from hg_scale.training.corpora import open_sources
    from hg_scale.training.validation import Validator

    config = parse_config(tree, world_size=dist.get_world_size())
    mesh, _ = make_mesh(config.parallel)
    held_out = Validator(config, open_sources(config), mesh, torch.device("cpu"), "validation")
    counted = 0
    for batch in held_out.batches(held_out.parts[0]):
        assert batch is not None
        counted += int((batch[1] >= 0).sum())
    try:
        held_out.settle()
    except UserError as error:
        return (type(error).__name__, str(error)), counted
    return None, counted


def test_a_broken_validation_shard_stops_all_ranks(worlds: Worlds, corpus: Index) -> None:
    """The one that met it gives batches without labels until the validation is over."""
    assert [count for _, count in worlds.run(2, validate, config_of(corpus))] == [256, 256]
    path = Path(corpus.location, "validation-00000.tar")
    content = bytearray(path.read_bytes())
    content[corpus.splits["validation"].shards[0].members.offsets[0] + 800] ^= 1
    path.write_bytes(content)
    faults = [fault for fault, _ in worlds.run(2, validate, config_of(corpus))]
    assert "validation-00000.tar: member 0" in faults[0][1]
    assert faults[1] is not None


def test_sources_that_end_too_early_are_refused(worlds: Worlds, corpus: Index) -> None:
    from hg_scale.config.errors import ConfigError

    source = {"path": corpus.location, "when_exhausted": "retire"}
    tree = merge(TREE, {"data": {"sources": [source]}})
    windows = 12 * (1000 // 64 - 1)
    assert len(worlds.run(1, serve, tree, windows // 8)[0]["served"]) == windows // 8
    with pytest.raises(AssertionError, match=f"{ConfigError.__name__}.*|retire"):
        worlds.run(1, serve, tree, windows // 8 + 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"tokenizer": "sentencepiece"}, "was made with bytes"),
        ({"sources": "twice"}, "are the same data"),
        ({"path": "nowhere/at/all"}, "no such folder"),
    ],
)
def test_data_that_does_not_suit(corpus: Index, data: dict[str, Any], message: str) -> None:
    from hg_scale.config.errors import ConfigError
    from hg_scale.training.corpora import open_sources

    if data.get("sources") == "twice":
        paths = [corpus.location, f"pipe:cat {corpus.location}/{{}}"]
        data = {"path": None, "sources": [{"path": p, "name": p} for p in paths]}
    with pytest.raises(ConfigError, match=message):
        open_sources(parse_config(merge(config_of(corpus), {"data": data})))


def test_the_whole_of_several_sources_is_their_mean_by_weight(
    corpus: Index, tmp_path: Path
) -> None:
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
    opened = open_sources(config)
    held_out = Validator(config, opened, Mesh(0, 1, 1, 1), torch.device("cpu"), "validation")
    assert [part.tokens for part in held_out.parts] == [512, 500]
    record = held_out.record([512 * 4.0, 500 * 2.0])
    assert record["validation_loss"] == pytest.approx(3.5)
    assert record["validation_loss_by_source"] == {"shards": 4.0, "more": 2.0}
    assert record["validation_bits_per_byte"] == pytest.approx(3.5 / np.log(2))
    assert bytes_per_token(opened) == 1.0
