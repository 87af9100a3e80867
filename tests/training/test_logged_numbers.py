"""Every number of a logged line against a computation of its own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hg_scale.data.index import read_index
from hg_scale.model.costs import training_flops_per_token
from tests.data.conftest import prose
from tests.runs import TINY, records, train_in
from tests.world import Worlds

STEPS = 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text in the pieces of a sentencepiece model: a token stands for several bytes."""
    from hg_scale.data.preparation.documents import TextFormat
    from hg_scale.data.preparation.shuffled import Job, prepare
    from hg_scale.data.preparation.text_corpus import TextCorpus
    from hg_scale.data.preparation.tokenizer_training import TokenizerTraining, train_tokenizer
    from hg_scale.data.progress import ProgressBar
    from hg_scale.data.tokenizer import SentencePieceTokenizer

    folder = tmp_path_factory.mktemp("numbers")
    text = folder / "text.txt"
    text.write_text("\n\n".join(prose(300, seed) for seed in range(120)))
    model = folder / "tok.model"
    train_tokenizer(TokenizerTraining((text,), model, 400, "bpe"), ProgressBar())
    tokenizer = SentencePieceTokenizer(model.read_bytes(), documents=True)
    job = Job(
        TextCorpus(
            (text,), tokenizer, format=TextFormat(separator=b"\n\n"), fractions=(0.9, 0.1, 0.0)
        ),
        (text,),
        folder / "corpus",
    )
    prepare(job, ProgressBar())
    return folder / "corpus"


@pytest.mark.parametrize("size", [1, 2])
def test_every_logged_number(worlds: Worlds, corpus: Path, tmp_path: Path, size: int) -> None:
    index = read_index(str(corpus))
    tree: dict[str, Any] = json.loads(json.dumps(TINY))
    tree["model"] |= {"vocab_size": index.vocab_size}
    tree["training"] |= {"steps": STEPS, "validate_every": STEPS}
    tree["data"] = {"path": str(corpus)}
    (tmp_path / "c.json").write_text(json.dumps(tree))
    run = tmp_path / "run"
    done = train_in(worlds, size, tmp_path, "--config", str(tmp_path / "c.json"), "--run", str(run))
    assert done.code == 0
    from hg_scale.config.load import load_config

    config = load_config(tmp_path / "c.json")
    lines = [line for line in records(run) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    train = index.split("train")
    bytes_per_token = train.text_bytes / train.tokens
    assert bytes_per_token > 1.5  # so that a factor the wrong way round shows
    tokens_per_step = config.training.global_batch_size * config.model.sequence_length
    flops = training_flops_per_token(config.model)
    peaks = [line["flops_per_second"] / line["mfu"] for line in lines]
    for line in lines:
        step = line["step"]
        assert line["bits_per_byte"] == pytest.approx(line["loss"] / math.log(2) / bytes_per_token)
        assert line["tokens"] == step * tokens_per_step
        assert line["epoch"] == pytest.approx(step * tokens_per_step / train.tokens, rel=0.05)
        parts = line["data_seconds"] + line["compute_seconds"] + line["rest_seconds"]
        assert line["step_seconds"] == pytest.approx(parts)
        assert line["tokens_per_second"] == pytest.approx(tokens_per_step / line["step_seconds"])
        assert line["flops_per_second"] == pytest.approx(line["tokens_per_second"] * flops)
        assert line["skipped_steps"] == line["skipped_windows"] == 0
        assert 0 < line["memory_gib"] <= line["peak_memory_gib"] < 64
    # The denominator of MFU is the peak that the start prints, times the number of ranks.
    printed = next(
        text for text in done.output.splitlines() if text.startswith("peak of one device")
    )
    peak = float(printed.split(": ")[1].split()[0]) * 1e12 * size
    assert peaks == pytest.approx([peak] * STEPS, rel=0.01)
    (validation,) = [line for line in records(run) if "validation_loss" in line]
    held_out = index.split("validation")
    ratio = validation["validation_loss"] / math.log(2) / validation["validation_bits_per_byte"]
    assert ratio == pytest.approx(held_out.text_bytes / held_out.tokens, rel=0.1)
