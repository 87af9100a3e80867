"""Write a checkpoint from any source of weights: imports, averages.

A run that starts from one starts from scratch, except for the weights: step 0, the first of its
data, Adam's moments and step count 0, so that warm-up has its usual effect. If the source has
moments and the progress of training (checkpoints, DeepSpeed's universal format), these are kept and
a run resumes.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

from hg_scale.checkpoint.checksum import ComputeChecksum
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.fragments import KINDS, Fragment, Slice
from hg_scale.checkpoint.jobs import ProgressReporter, run_jobs
from hg_scale.checkpoint.manifest import CHECKPOINT_VERSION, MANIFEST, STEP_FOLDER, seal
from hg_scale.checkpoint.safetensors_file import TensorRegion, create_safetensors
from hg_scale.convert.export import copy_tensors, split_into_files
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
    allow_non_finite: bool = False,
) -> None:
    """Write the checkpoint folder `out`. Raises CheckpointError, also if the source is corrupt.

    Elements that are not finite are refused, unless `allow_non_finite`: a run would start from
    them and never recover.
    """
    resumable = source.kinds == KINDS and source.progress is not None
    step, match = source.step if resumable else 0, STEP_FOLDER.fullmatch(out.name)
    if match and int(match[1]) != step:
        raise CheckpointError(f"{out}: the checkpoint is of step {step}; choose another name")
    source.require_unchanged(workers, report)
    with new_folder(out) as folder:
        regions: dict[tuple[str, str], TensorRegion] = {}
        files: dict[str, list[str]] = {}
        sizes = {name: 4 * len(KINDS) * prod(shape) for name, shape in source.shapes.items()}
        for rank, names in enumerate(split_into_files(sizes, file_bytes)):
            file = f"rank-{rank:05}.safetensors"
            files[file] = names
            # By kind, so that moments that are not written are one hole in the file.
            tensors = [
                (f"{number}.{kind}", (prod(source.shapes[name]),))
                for kind in KINDS
                for number, name in enumerate(names)
            ]
            created = create_safetensors(folder / file, tensors)
            for number, name in enumerate(names):
                for kind in KINDS if resumable else ("fp32",):
                    regions[name, kind] = created[f"{number}.{kind}"]
        copy_tensors(source, regions, workers, report, "importing", allow_non_finite)
        sizes = {file: (folder / file).stat().st_size for file in files}
        report.begin("checksums", sum(sizes.values()))
        entries = []
        for file, checksum in run_jobs(ComputeChecksum(folder), files, workers):
            report.advance(sizes[file])
            fragments = [
                Fragment(Slice(name, source.shapes[name]), 0, prod(source.shapes[name])).to_json()
                for name in files[file]
            ]
            entries.append(
                {"name": file, "bytes": sizes[file], "checksum": checksum, "fragments": fragments}
            )
        manifest = _manifest(source, resumable) | {"files": entries}
        (folder / MANIFEST).write_text(json.dumps(seal(manifest)), encoding="utf-8")


def _manifest(source: WeightSource, resumable: bool) -> dict[str, Any]:
    """Return the manifest without its files, as a run would have written it."""
    step = source.step if resumable else 0
    start = {"step": 0, "position": 0, "skipped": 0, "data": {}}
    return {
        "format_version": CHECKPOINT_VERSION,
        "step": step,
        "progress": source.progress if resumable else start,
        "optimizer_step": source.optimizer_step if resumable else 0,
        "moments": resumable,
        "layout": _LAYOUT,
        "config": (source.config or {}) | {"model": source.model.model_dump()},
        "versions": {name: _version(name) for name in ("hg-scale", "torch", "deepspeed", "numpy")},
        "tokenizer": source.tokenizer,
        "source": {
            "kind": source.format_name,
            "name": source.path.resolve().name,
            "step": source.step,
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
