"""Run folders written by hand, without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hg_scale.checkpoint.manifest import CHECKPOINT_VERSION, seal
from hg_scale.config.load import parse_config
from hg_scale.config.read import merge
from tests.manifests import meta
from tests.runs import TINY

STEPS = 400


def write_run(
    folder: Path, *, logged: int = STEPS, change: dict[str, Any] | None = None, offset: float = 0.0
) -> Path:
    """Write a run of STEPS steps, logged up to `logged`, validated and saved every 100."""
    tree = merge(TINY, {"training": {"steps": STEPS}, "data": {"path": "nowhere/text"}})
    config = parse_config(merge(tree, change or {})).model_dump(mode="json")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, logged + 1):
            file.write(json.dumps(step_record(step, offset)) + "\n")
            if step % 100 == 0:
                file.write(json.dumps(validation_record(step, offset)) + "\n")
    for step in range(100, logged + 1, 100):
        write_checkpoint(folder, step, {"tensor": 1, "pipeline": 1, "data": 2, "zero_stage": 1})
    return folder


def step_record(step: int, offset: float = 0.0) -> dict[str, Any]:
    """Return the record of a step of 128 tokens that took half a second."""
    bits = 1.5 + offset + 6 / step**0.5 + 0.1 * math.sin(3 * step)
    return {
        "step": step, "loss": bits * math.log(2), "bits_per_byte": bits, "grad_norm": 1 / step,
        "learning_rate": 1e-3, "tokens": 128 * step, "step_seconds": 0.5, "data_seconds": 0.002,
        "tokens_per_second": 256.0, "mfu": 0.4, "memory_gib": 0.5, "peak_memory_gib": 0.6,
        "skipped_steps": 0, "time": 1e9 + step,
    }  # fmt: skip


def validation_record(step: int, offset: float = 0.0) -> dict[str, Any]:
    """Return the record of the validation after a step."""
    bits = 1.6 + offset + 6 / step**0.5
    return {
        "step": step, "validation_loss": bits * math.log(2), "validation_bits_per_byte": bits,
        "validation_tokens": 4096, "time": 1e9 + step,
    }  # fmt: skip


def write_checkpoint(folder: Path, step: int, layout: dict[str, int]) -> None:
    """Write a checkpoint that is complete as far as file names and sizes show."""
    path = folder / "checkpoints" / f"step-{step:08}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "rank-00000.safetensors").write_bytes(bytes(1000))
    name, checksum = "rank-00000.safetensors", f"xxh3_128:{0:032}"
    files = [{"name": name, "bytes": 1000, "checksum": checksum, "fragments": []}]
    head = {"format_version": CHECKPOINT_VERSION, "step": step}
    manifest = {**head, **meta(step), "layout": layout, "files": files}
    (path / "manifest.json").write_text(json.dumps(seal(manifest)))
