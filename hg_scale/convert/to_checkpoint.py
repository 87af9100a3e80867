"""Writing a checkpoint from weights that were not trained here: imports, averages.

What starts from one begins anew: step 0, the first of its data, Adam's moments zero and its step
count 0, so that a warm-up does what it does in any run. Where the source carries moments and says
where training stood (DeepSpeed's universal format), that is kept, and training goes on.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

from hg_scale.checkpoint.checksum import Checksum
from hg_scale.checkpoint.find import MANIFEST
from hg_scale.checkpoint.fragments import KINDS, Fragment, Slice
from hg_scale.checkpoint.jobs import ProgressReporter, run_jobs
from hg_scale.checkpoint.safetensors_file import TensorRegion, create
from hg_scale.checkpoint.versions import CHECKPOINT_VERSION, seal
from hg_scale.convert.export import copy_pieces, split_into_files
from hg_scale.convert.output import new_folder
from hg_scale.convert.source import WeightSource

FILE_BYTES = 16_000_000_000
_LAYOUT = {"tensor": 1, "pipeline": 1, "data": 1, "zero_stage": 0}


def to_checkpoint(
    source: WeightSource,
    out: Path,
    *,
    workers: int = 1,
    report: ProgressReporter,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write the checkpoint folder `out`. Raises CheckpointError; on a damaged source, too."""
    source.require_unchanged(workers, report)
    goes_on = source.kinds == KINDS and source.progress is not None
    with new_folder(out) as folder:
        places: dict[tuple[str, str], TensorRegion] = {}
        files: dict[str, list[str]] = {}
        sizes = {name: 4 * len(KINDS) * prod(shape) for name, shape in source.shapes.items()}
        for rank, names in enumerate(split_into_files(sizes, file_bytes)):
            file = f"rank-{rank:05}.safetensors"
            files[file] = names
            # By kind, so that moments that are not written are one hole of the file.
            tensors = [
                (f"{number}.{kind}", source.shapes[name])
                for kind in KINDS
                for number, name in enumerate(names)
            ]
            flat = [(key, (prod(shape),)) for key, shape in tensors]
            made = create(folder / file, flat)
            for number, name in enumerate(names):
                for kind in KINDS if goes_on else ("fp32",):
                    places[name, kind] = made[f"{number}.{kind}"]
        copy_pieces(source, places, workers, report, "importing")
        sizes = {file: (folder / file).stat().st_size for file in files}
        report.begin("checksums", sum(sizes.values()))
        entries = []
        for file, checksum in run_jobs(Checksum(folder), files, workers):
            report.advance(sizes[file])
            fragments = [
                Fragment(Slice(name, source.shapes[name]), 0, prod(source.shapes[name])).to_json()
                for name in files[file]
            ]
            entries.append(
                {"name": file, "bytes": sizes[file], "checksum": checksum, "fragments": fragments}
            )
        manifest = _head(source, goes_on) | {"files": entries}
        (folder / MANIFEST).write_text(json.dumps(seal(manifest)), encoding="utf-8")


def _head(source: WeightSource, goes_on: bool) -> dict[str, Any]:
    """The manifest but for the files, as a run would have written it."""
    step = source.step if goes_on else 0
    begin = {"step": 0, "position": 0, "skipped": 0, "data": {}}
    return {
        "format_version": CHECKPOINT_VERSION,
        "step": step,
        "progress": source.progress if goes_on else begin,
        "optimizer_step": source.optimizer_step if goes_on else 0,
        "moments": goes_on,
        "layout": _LAYOUT,
        "config": (source.config or {}) | {"model": source.model.model_dump()},
        "versions": {name: _version(name) for name in ("hg-scale", "torch", "deepspeed", "numpy")},
        "tokenizer": source.tokenizer,
        "source": {"kind": source.what, "name": source.path.resolve().name, "step": source.step},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
