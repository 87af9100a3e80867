"""What a run reached: its held-out bits per byte beside compressors, and a sample."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from hg_scale.checkpoint.find import find_latest
from hg_scale.checkpoint.load import read_parameters
from hg_scale.config.load import load_config
from hg_scale.config.schema import Config, SourceConfig
from hg_scale.data.evaluation import split_text
from hg_scale.data.index import Index, read_index
from hg_scale.errors import UserError
from hg_scale.model.hourglass import Hourglass

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda text: gzip.compress(text, 9),
    "bzip2 -9": lambda text: bz2.compress(text, 9),
    "xz -9e": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
}
TEMPERATURE = 0.8


def held_out_text(corpora: Sequence[SourceConfig], limit: int | None = None) -> bytes:
    """The validation text of the corpora that have one, or of the first `limit` tokens of each.

    Raises UserError where a corpus is not at hand.
    """
    indexes = [index_of_run(corpus.path) for corpus in corpora]
    held_out = [index for index in indexes if "validation" in index.splits]
    return b"".join(split_text(index, "validation", limit) for index in held_out)


def compressed(compressor: str, text: bytes) -> float:
    """Bits per byte that one of `COMPRESSORS` needs for `text`, which is not empty."""
    return 8 * len(COMPRESSORS[compressor](text)) / len(text)


def comparison(run: Path, with_compressors: bool) -> Table:
    """Bits per byte of the held-out text, the run's last validation first."""
    config = load_config(run / "config.json")
    record = last_validation(run / "metrics.jsonl")
    table = Table(title="held-out text, bits per byte (less is better)")
    table.add_column("what")
    table.add_column("bits per byte", justify="right")
    name = f"hourglass {config.model.hierarchy}, step {record['step']}"
    table.add_row(name, f"{record['validation_bits_per_byte']:.3f}", style="bold")
    if with_compressors:
        text = held_out_text(config.data.corpora)
        for compressor in COMPRESSORS:
            table.add_row(compressor, f"{compressed(compressor, text):.3f}")
        table.caption = f"{len(text):,} bytes that were not trained on"
    return table


def index_of_run(path: str) -> Index:
    """The index of data that a run's folder names: looking at a run must not run a command."""
    if path.startswith("pipe:"):
        raise UserError(f"the run's data is a command, which is not run here: {path}")
    return read_index(path)


def last_validation(metrics: Path) -> dict[str, Any]:
    """The last validation record of a run."""
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    for line in reversed(lines):
        record = json.loads(line)
        if "validation_bits_per_byte" in record:
            return record
    raise UserError(f"{metrics} holds no validation: train to the end, or set validate_every")


def sample_text(run: Path, tokens: int, seed: int) -> str:
    """Text that the last checkpoint writes, one token at a time, from an empty beginning."""
    config = load_config(run / "config.json")
    checkpoint = find_latest(run / "checkpoints")
    if checkpoint is None:
        raise UserError(f"{run / 'checkpoints'} holds no whole checkpoint")
    model = load_model(config, checkpoint)
    tokenizer = index_of_run(config.data.corpora[0].path).open_tokenizer()
    start = tokenizer.eod or 0
    ids = sample(model, [start], tokens, TEMPERATURE, seed, config.model.sequence_length)
    text = tokenizer.decode(torch.tensor([i for i in ids if i != tokenizer.eod]).numpy())
    return text.decode("utf-8", errors="replace")


def load_model(config: Config, checkpoint: Path) -> Hourglass:
    """The plain model with a checkpoint's weights, in fp32."""
    model = Hourglass(config.model)
    model.load_state_dict(dict(read_parameters(checkpoint)))
    return model.eval()


@torch.inference_mode()
def sample(
    model: Hourglass, prompt: list[int], tokens: int, temperature: float, seed: int, window: int
) -> list[int]:
    """The ids that follow the prompt, each drawn from the model's distribution."""
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(tokens):
        logits = model(torch.tensor([ids[-window:]]))[0, -1, : model.config.vocab_size]
        probabilities = (logits.float() / temperature).softmax(0)
        ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return ids[len(prompt) :]
