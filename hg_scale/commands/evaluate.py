"""Score a checkpoint or an export on held-out text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hg_scale.model.hourglass import Hourglass

HELP = "score a checkpoint or an export on a split of a prepared corpus, in bits per byte"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="RUN_OR_CHECKPOINT",
        help="a run folder (its newest checkpoint), a checkpoint folder, or an export")  # fmt: skip
    add("--data", metavar="SHARDS", help="prepared corpus (default: that of the run)")
    add("--split", default="test", help="train, validation or test (default: test)")
    add("--windows", type=int, metavar="N", help="score the first N windows only")
    add("--batch", type=int, default=8, metavar="N", help="windows at once (default: 8)")
    add("--precision", choices=("fp32", "bf16"), default="fp32",
        help="what to compute in (default: fp32)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="also write the figures here")


def run(options: argparse.Namespace) -> int:
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from hg_scale.checkpoint.open import is_export
    from hg_scale.data.index import read_index
    from hg_scale.training.scoring import score_split
    from hg_scale.training.summary import index_of_run

    open_weights = _open_export if is_export(options.checkpoint) else _open_checkpoint
    checkpoint, step, model, path = open_weights(options.checkpoint, options.data)
    index = read_index(path) if options.data else index_of_run(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    model = model.to(device, dtype)
    total = index.split(options.split).tokens
    if options.windows:
        total = min(total, options.windows * model.config.sequence_length)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"scoring {options.split}", total=total)
        score = score_split(
            model, index, options.split, options.batch, options.windows,
            lambda tokens: progress.advance(task, tokens),
        )  # fmt: skip
    figures = {
        "checkpoint": str(checkpoint),
        "step": step,
        "data": str(path),
        "split": options.split,
        "precision": options.precision,
        "context": model.config.sequence_length,
        "tokens": score.tokens,
        "bytes": round(score.bytes),
        "nats_per_token": score.nats_per_token,
        "bits_per_byte": score.bits_per_byte,
    }
    print(f"{checkpoint}, step {step:,}, {options.split} split of {path}")
    print(f"  {score.tokens:,} tokens, {round(score.bytes):,} bytes, each scored once")
    print(f"  {score.nats_per_token:.4f} nats a token, {score.bits_per_byte:.4f} bits a byte")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def _open_checkpoint(folder: Path, data: str | None) -> tuple[Path, int, Hourglass, str]:
    """A checkpoint (a run's newest): where it is, its step, the model, and the data to score."""
    from hg_scale.checkpoint.find import find_latest
    from hg_scale.checkpoint.load import read_manifest
    from hg_scale.config.load import parse_config
    from hg_scale.errors import UserError
    from hg_scale.training.summary import load_model

    checkpoint = find_latest(folder / "checkpoints") or folder
    manifest = read_manifest(checkpoint)
    config = parse_config({"model": manifest["config"]["model"]})
    path = data or manifest["config"]["data"].get("path")
    if path is None:
        raise UserError(f"{checkpoint}: names no data of its own; give --data SHARDS")
    return checkpoint, manifest["step"], load_model(config, checkpoint), path


def _open_export(folder: Path, data: str | None) -> tuple[Path, int, Hourglass, str]:
    """The same of an export, which needs to be told the data; it must be of the same tokenizer."""
    from hg_scale.checkpoint.export import load_export
    from hg_scale.checkpoint.source import ExportSource
    from hg_scale.data.index import read_index
    from hg_scale.errors import UserError

    source = ExportSource(folder)
    if data is None:
        raise UserError(f"{folder}: an export names no data; give --data SHARDS")
    ours, theirs = source.tokenizer, read_index(data).tokenizer.model_dump()
    if ours is not None and ours != theirs:
        raise UserError(
            f"{data}: made with another tokenizer ({theirs['name']}, vocabulary "
            f"{theirs['vocab_size']}) than {folder} ({ours['name']}, vocabulary "
            f"{ours['vocab_size']}); prepare the text again with the tokenizer of the export"
        )
    return folder, source.step, load_export(folder), data
