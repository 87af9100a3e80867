"""Bits per byte that can be trusted."""

from __future__ import annotations

import pytest
import torch

from hg_scale.config.schema import ModelConfig
from hg_scale.data.prepare import Preparation, prepare_bytes
from hg_scale.model.hourglass import Hourglass
from hg_scale.parallel.initialization import initialize
from hg_scale.training.scoring import score_split


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("text")
    (folder / "text").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 60)
    job = Preparation(folder / "text", folder / "shards", split=(1000, 700, 1000))
    return prepare_bytes(job)[0]


@pytest.fixture(scope="module")
def model() -> Hourglass:
    config = ModelConfig(
        hierarchy="1@1 1@2 1@1", d_model=32, heads=2, d_ff=64, sequence_length=64, window=[8, None],
        pooling="average", upsampling="linear", positions="rotary",
    )  # fmt: skip
    model = Hourglass(config)
    initialize(list(model.named_parameters()), config, seed=1)
    return model


def test_a_uniform_model_scores_8_bits_a_byte(index, model: Hourglass) -> None:  # type: ignore[no-untyped-def]
    uniform = Hourglass(model.config)
    torch.nn.init.zeros_(uniform.get_parameter("head.linear.weight"))
    torch.nn.init.zeros_(uniform.get_parameter("head.linear.bias"))
    score = score_split(uniform, index, "validation")
    assert score.bits_per_byte == pytest.approx(8, rel=1e-7)
    assert (score.tokens, score.bytes) == (700, 700)


def test_the_score_does_not_depend_on_the_rows(index, model: Hourglass) -> None:  # type: ignore[no-untyped-def]
    scores = [score_split(model, index, "test", rows).nats for rows in (1, 3, 16)]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-6)


def test_every_token_is_scored_once(index, model: Hourglass) -> None:  # type: ignore[no-untyped-def]
    """Against a loop over the text; the last window is a short one."""
    text = (b"the quick brown fox jumps over the lazy dog. " * 60)[1000:1700]
    ids, nats = torch.tensor([0, *text]), 0.0
    with torch.no_grad():
        for start in range(0, 700, 64):
            inputs, labels = ids[start : start + 64][: 700 - start], ids[start + 1 : start + 65]
            logits = model(inputs[None])[0].double()
            nats += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    counted: list[int] = []
    score = score_split(model, index, "validation", rows=4, advance=counted.append)
    assert score.nats == pytest.approx(nats, rel=1e-6)
    assert sum(counted) == 700


def test_a_part_has_its_share_of_the_bytes(index, model: Hourglass) -> None:  # type: ignore[no-untyped-def]
    score = score_split(model, index, "validation", limit_windows=5)
    assert (score.tokens, score.bytes) == (320, 320)
