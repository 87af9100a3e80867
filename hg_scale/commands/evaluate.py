"""Score a checkpoint on held-out text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "score a checkpoint on a split of a prepared corpus, in bits per byte"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="RUN_OR_CHECKPOINT",
        help="a run folder (its newest checkpoint) or a checkpoint folder")  # fmt: skip
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

    from hg_scale.checkpoint.find import find_latest
    from hg_scale.checkpoint.load import read_manifest
    from hg_scale.config.load import parse_config
    from hg_scale.data.index import read_index
    from hg_scale.errors import UserError
    from hg_scale.training.scoring import score_split
    from hg_scale.training.summary import index_of_run, load_model

    folder = options.checkpoint
    checkpoint = find_latest(folder / "checkpoints") or folder
    manifest = read_manifest(checkpoint)
    config = parse_config({"model": manifest["config"]["model"]})
    path = options.data or manifest["config"]["data"].get("path")
    if path is None:
        raise UserError(f"{checkpoint}: names no data of its own; give --data SHARDS")
    index = read_index(path) if options.data else index_of_run(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    model = load_model(config, checkpoint).to(device, dtype)
    total = index.split(options.split).tokens
    if options.windows:
        total = min(total, options.windows * config.model.sequence_length)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"scoring {options.split}", total=total)
        score = score_split(
            model, index, options.split, options.batch, options.windows,
            lambda tokens: progress.advance(task, tokens),
        )  # fmt: skip
    figures = {
        "checkpoint": str(checkpoint),
        "step": manifest["step"],
        "data": str(path),
        "split": options.split,
        "precision": options.precision,
        "context": config.model.sequence_length,
        "tokens": score.tokens,
        "bytes": round(score.bytes),
        "nats_per_token": score.nats_per_token,
        "bits_per_byte": score.bits_per_byte,
    }
    print(f"{checkpoint}, step {manifest['step']:,}, {options.split} split of {path}")
    print(f"  {score.tokens:,} tokens, {round(score.bytes):,} bytes, each scored once")
    print(f"  {score.nats_per_token:.4f} nats a token, {score.bits_per_byte:.4f} bits a byte")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0
