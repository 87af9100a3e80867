"""The record of a validation, and the batches of each part."""

from __future__ import annotations

import json
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch

from hg_scale.config.load import parse_config
from hg_scale.data.evaluation import split_bytes
from hg_scale.data.index import read_index
from hg_scale.data.sequence_schedule import DataSource
from hg_scale.parallel.mesh import Mesh
from hg_scale.training.validation import Validator
from tests.runs import TINY

LENGTH = TINY["model"]["sequence_length"]


def validator(corpus: Path, weights: tuple[float, ...], rank: int, **training: Any) -> Validator:
    index = read_index(str(corpus))
    tree = json.loads(json.dumps(TINY))
    tree["training"] |= {"micro_batch_size": 3, "global_batch_size": 12} | training
    tree["data"] = {"path": str(corpus)}
    sources = [DataSource(f"s{i}", index, weight) for i, weight in enumerate(weights)]
    mesh = Mesh(rank, 1, 1, 2)
    return Validator(parse_config(tree), sources, mesh, torch.device("cpu"), "validation")


@pytest.mark.parametrize("limit", [None, 5, 7])
def test_the_batches_of_all_ranks_are_the_split(corpus: Path, limit: int | None) -> None:
    labels = []
    for rank in (0, 1):
        found = validator(corpus, (1.0,), rank, validation_windows=limit)
        (part,) = found.parts
        batches = list(found.batches(part))
        assert len(batches) == found.count(part)
        labels += [batch[1].flatten() for batch in batches if batch]
    total = read_index(str(corpus)).split("validation").tokens
    expected = min(total, limit * LENGTH) if limit else total
    assert int((torch.cat(labels) >= 0).sum()) == expected == found.tokens


def test_losses_are_weighted_as_in_the_mixture(corpus: Path) -> None:
    found = validator(corpus, (3.0, 1.0), 0, validation_windows=None)
    tokens = found.parts[0].tokens
    record = found.record([2.0 * tokens, 6.0 * tokens])
    assert record["validation_loss"] == pytest.approx(2.0 * 0.75 + 6.0 * 0.25)
    assert record["validation_loss_by_source"] == {"s0": 2.0, "s1": 6.0}
    assert record["validation_tokens"] == 2 * tokens
    index = read_index(str(corpus))
    ratio = split_bytes(index, "validation") / index.split("validation").tokens
    assert ratio < 1  # ends of documents stand for no byte
    assert record["validation_bits_per_byte"] == pytest.approx(3.0 / log(2) / ratio)


def test_bytes_of_a_part_are_its_share_until_they_are_counted(corpus: Path) -> None:
    found = validator(corpus, (1.0,), 0, validation_windows=5)
    index = read_index(str(corpus))
    share = 5 * LENGTH / index.split("validation").tokens
    assert share < 0.5
    assert found.parts[0].bytes == pytest.approx(split_bytes(index, "validation") * share)
