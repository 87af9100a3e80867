"""What `hg-scale convert` shows of weights, in words and tables."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from hg_scale.convert.compare import Difference
from hg_scale.convert.health import Health
from hg_scale.convert.source import CheckpointSource, ExportSource, WeightSource


def facts_of(source: WeightSource, health: Sequence[Health]) -> dict[str, str]:
    """Lines about the whole. `health`: of every tensor, or nothing where none was read."""
    model = source.model
    facts = {
        "kind": source.what,
        "step": f"{source.step:,}",
        "model": f"{model.hierarchy}, d_model {model.d_model}, vocabulary {model.vocab_size:,}",
        "parameters": f"{source.parameters:,} in {len(source.shapes)} tensors",
        "holds": ", ".join(source.kinds),
    }
    if source.tokenizer:
        facts["tokenizer"] = " ".join(
            str(source.tokenizer[key]) for key in ("name", "vocab_size", "eod", "sha256")
            if source.tokenizer.get(key) is not None
        )  # fmt: skip
    if isinstance(source, CheckpointSource):
        facts |= _of_a_checkpoint(source.manifest)
    if isinstance(source, ExportSource):
        facts["precision"] = str(source.described.get("precision"))
    if health:
        faults = [h.fault for h in health if h.fault]
        facts["health"] = "all finite" if not faults else "; ".join(map(str, faults[:5]))
    return facts


def _of_a_checkpoint(manifest: dict[str, Any]) -> dict[str, str]:
    layout, progress, files = manifest["layout"], manifest["progress"], manifest["files"]
    sizes = [file["bytes"] for file in files]
    facts = {
        "written by": f"tensor {layout['tensor']} x pipeline {layout['pipeline']} x data "
        f"{layout['data']}, ZeRO {layout['zero_stage']}",
        "optimizer step": f"{manifest['optimizer_step']:,}",
        "data position": f"{progress['position']:,} tokens",
        "steps skipped": f"{progress['skipped']:,}",
        "files": f"{len(files)}, {sum(sizes):,} bytes, {min(sizes):,} to {max(sizes):,} each, "
        f"{sum(len(file['fragments']) for file in files):,} fragments",
        "versions": ", ".join(f"{k} {v}" for k, v in manifest["versions"].items()),
    }
    if "source" in manifest:
        facts["made from"] = " ".join(map(str, manifest["source"].values()))
    return facts


def tensors_table(source: WeightSource, health: Sequence[Health]) -> Table:
    """A line a tensor: shape, and where it was read the size of its numbers."""
    figures = {(h.name, h.kind): h for h in health}
    table = Table(box=SIMPLE)
    table.add_column("tensor", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("elements", justify="right")
    if health:
        table.add_column("rms", justify="right")
        table.add_column("largest", justify="right")
        for kind in source.kinds[1:]:
            table.add_column(f"rms {kind}", justify="right", no_wrap=True)
    for name, shape in source.shapes.items():
        row = [name, " x ".join(map(str, shape)), f"{prod(shape):,}"]
        if health:
            weights = figures[name, "fp32"]
            row += [f"{weights.rms:.3g}", f"{weights.largest:.3g}"]
            row += [f"{figures[name, kind].rms:.3g}" for kind in source.kinds[1:]]
        faulty = any(h.fault for h in health if h.name == name)
        table.add_row(*row, style="red" if faulty else None)
    return table


def differences_table(differences: Sequence[Difference], top: int) -> Table:
    """The largest first; NaN before all."""
    order = sorted(differences, key=lambda d: (d.largest == d.largest, -d.largest))
    table = Table(box=SIMPLE)
    table.add_column("tensor", no_wrap=True)
    for title in ("largest", "rms", "relative", "unequal"):
        table.add_column(title, justify="right")
    for d in order[:top]:
        name = d.name if d.kind == "fp32" else f"{d.name} ({d.kind})"
        share = f"{d.unequal:,} of {prod(d.shape):,}"
        table.add_row(name, f"{d.largest:.3g}", f"{d.rms:.3g}", f"{d.relative:.2%}", share)
    if len(order) > top:
        table.caption = f"{len(order) - top} more; --top lists them"
    return table
