"""The summaries and tables that `hg-scale convert inspect` and `diff` print."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from hg_scale.convert.checkpoint_source import CheckpointSource
from hg_scale.convert.compare import TensorDifference
from hg_scale.convert.export_source import ExportSource
from hg_scale.convert.health import TensorHealth
from hg_scale.convert.source import WeightSource


def summarize(source: WeightSource, health: Sequence[TensorHealth]) -> dict[str, str]:
    """Return lines (title, value) about a source. health: of every tensor, empty if not read."""
    model = source.model
    summary = {
        "kind": source.format_name,
        "step": f"{source.step:,}",
        "model": f"{model.hierarchy}, d_model {model.d_model}, vocabulary {model.vocab_size:,}",
        "parameters": f"{source.parameters:,} in {len(source.shapes)} tensors",
        "holds": ", ".join(source.kinds),
    }
    if source.tokenizer:
        summary["tokenizer"] = " ".join(
            str(source.tokenizer[key]) for key in ("name", "vocab_size", "eod", "sha256")
            if source.tokenizer.get(key) is not None
        )  # fmt: skip
    if isinstance(source, CheckpointSource):
        summary |= _summarize_manifest(source.manifest)
    if isinstance(source, ExportSource):
        summary["precision"] = str(source.config_json.get("precision"))
    if health:
        problems = [h.problem for h in health if h.problem]
        summary["health"] = "all finite" if not problems else "; ".join(problems[:5])
    return summary


def _summarize_manifest(manifest: dict[str, Any]) -> dict[str, str]:
    layout, progress, files = manifest["layout"], manifest["progress"], manifest["files"]
    sizes = [file["bytes"] for file in files]
    summary = {
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
        summary["made from"] = " ".join(map(str, manifest["source"].values()))
    return summary


def tensors_table(source: WeightSource, health: Sequence[TensorHealth]) -> Table:
    """Return a table with a line per tensor: its shape and, if `health` is given, statistics."""
    by_tensor = {(h.name, h.kind): h for h in health}
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
            weights = by_tensor[name, "fp32"]
            row += [f"{weights.rms:.3g}", f"{weights.largest:.3g}"]
            row += [f"{by_tensor[name, kind].rms:.3g}" for kind in source.kinds[1:]]
        bad = any(h.problem for h in health if h.name == name)
        table.add_row(*row, style="red" if bad else None)
    return table


def differences_table(differences: Sequence[TensorDifference], top: int) -> Table:
    """Return a table of the `top` largest differences; NaN comes first."""
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
