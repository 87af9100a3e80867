"""What a run reached: its held-out bits per byte beside compressors, and a sample."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from hg_scale.config.load import load_config
from hg_scale.data.evaluation import split_text
from hg_scale.errors import UserError
from hg_scale.evaluation.generation import Writing, write_texts
from hg_scale.evaluation.trained import index_of_run, load_trained
from hg_scale.model.sampling import Sampling

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda text: gzip.compress(text, 9),
    "bzip2 -9": lambda text: bz2.compress(text, 9),
    "xz -9e": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
}
TEMPERATURE = 0.8


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
    if with_compressors and len(config.data.corpora) > 1:
        table.caption = "no compressors: the figure is a mean over several sources"
    elif with_compressors:
        index = index_of_run(config.data.corpora[0].path)
        text = split_text(index, "validation", record["validation_tokens"])
        for compressor in COMPRESSORS:
            table.add_row(compressor, f"{compressed(compressor, text):.3f}")
        table.caption = f"{len(text):,} bytes that were not trained on"
    return table


def last_validation(metrics: Path) -> dict[str, Any]:
    """The last validation record of a run."""
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    for line in reversed(lines):
        record = json.loads(line)
        if "validation_bits_per_byte" in record:
            return record
    raise UserError(f"{metrics} holds no validation: train to the end, or set validate_every")


def sample_text(run: Path, tokens: int, seed: int) -> str:
    """Text that the last checkpoint writes from the beginning of a document."""
    how = Writing(Sampling(TEMPERATURE), tokens, seed)
    return "".join(piece.text for piece in write_texts(load_trained(run), [b""], how))
