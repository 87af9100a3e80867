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

    from hg_scale.training.scoring import score_split
    from hg_scale.training.trained import load_trained

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    trained = load_trained(options.checkpoint, options.data, dtype)
    model, index, checkpoint = trained.model, trained.index, trained.path
    length = model.config.sequence_length
    total = index.split(options.split).tokens
    if options.windows:
        total = min(total, options.windows * length)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"scoring {options.split}", total=total)
        score = score_split(
            model, index, options.split, options.batch, options.windows,
            lambda tokens: progress.advance(task, tokens),
        )  # fmt: skip
    figures = {
        "checkpoint": str(checkpoint),
        "step": trained.step,
        "data": trained.data,
        "split": options.split,
        "precision": options.precision,
        "context": length,
        "tokens": score.tokens,
        "bytes": round(score.bytes),
        "nats_per_token": score.nats_per_token,
        "bits_per_byte": score.bits_per_byte,
    }
    print(f"{checkpoint}, step {trained.step:,}, {options.split} split of {trained.data}")
    print(f"  {score.tokens:,} tokens, {round(score.bytes):,} bytes, each scored once")
    print(f"  {score.nats_per_token:.4f} nats a token, {score.bits_per_byte:.4f} bits a byte")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0
