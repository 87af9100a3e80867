"""Exports: write a folder of safetensors that loads without hg_scale, and load it.

    model.safetensors       weights by parameter name; above a size limit several files, with an
                            index in Hugging Face's format
    config.json             the model section, the origin of the weights, their tokenizer
    tokenizer.model         if the tokenizer has a model file
    README.md               a model card with the lines that load the weights

The padding of the vocabulary is kept: it is part of the model in `config.json`, so importing an
export restores the same weights bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from hg_scale import __version__
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.jobs import ProgressReporter, run_jobs
from hg_scale.checkpoint.safetensors_file import DTYPES, TensorRegion, create_safetensors
from hg_scale.convert.checkpoint_source import CheckpointSource
from hg_scale.convert.export_source import CONFIG, SAFETENSORS, SAFETENSORS_INDEX, ExportSource
from hg_scale.convert.layerwise_forward import BOUND, largest_difference
from hg_scale.convert.model_card import model_card
from hg_scale.convert.output import new_folder
from hg_scale.convert.source import WeightSource, parameter_chunks, require_usable
from hg_scale.data.tokenizer import MODEL_FILE, Tokenizer
from hg_scale.model.hourglass import Hourglass

EXPORT_VERSION = 1
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class ExportStyle:
    """What distinguishes another format, such as Hugging Face's, from a plain export."""

    prefix: str = ""  # of every parameter name
    config: Mapping[str, Any] = field(default_factory=dict)  # further keys of config.json
    files: Mapping[str, str] = field(default_factory=dict)  # further text files by name


PLAIN = ExportStyle()


@dataclass(frozen=True)
class CopyChunk:
    """Job: copy elements (name, kind, start, stop) of a source to a file; return how many.

    Raises CheckpointError unless they are finite or `allow_non_finite`.
    """

    source: WeightSource
    regions: dict[tuple[str, str], TensorRegion]  # by name and kind
    allow_non_finite: bool = False

    def __call__(self, chunk: tuple[str, str, int, int]) -> int:
        name, kind, start, stop = chunk
        values = self.source.read(name, kind, start, stop)
        if not self.allow_non_finite:
            require_usable(self.source, name, kind, values)
        self.regions[name, kind].write(start, values)
        return stop - start


def export(
    source: WeightSource,
    out: Path,
    *,
    dtype: str = "fp32",
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: Tokenizer | None = None,
    style: ExportStyle = PLAIN,
    report: ProgressReporter,
) -> float:
    """Write weights to the new folder `out`; return the largest difference of the logits.

    dtype: "fp32" or "bf16". shard_bytes: the largest file. tokenizer: that of the training data,
    None if not available. Raises CheckpointError if the source is corrupt or was trained with
    another tokenizer, if `out` cannot be written, or if its fp32 logits differ from the source's.
    """
    _refuse_other_tokenizer(source, tokenizer)
    source.require_unchanged(workers, report)
    with new_folder(out) as folder:
        regions = _create_files(folder, source, dtype, shard_bytes, style.prefix)
        copy_tensors(source, regions, workers, report, "exporting")
        config = export_config(source, dtype, tokenizer) | dict(style.config)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(
            model_card(out.name, config, source, bool(style.files)), encoding="utf-8"
        )
        if model := getattr(tokenizer, "model", None):
            (folder / MODEL_FILE).write_bytes(model)
        for name, text in style.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        exported = ExportSource(folder)
        difference = largest_difference(source, exported, report)
        exported.close()
        if dtype == "fp32" and not difference <= BOUND:
            raise CheckpointError(
                f"{out}: not exported: its logits differ from those of {source.path} by "
                f"{difference:.2e} (rounding explains at most {BOUND:.0e})"
            )
    return difference


def _refuse_other_tokenizer(source: WeightSource, tokenizer: Tokenizer | None) -> None:
    """Raise CheckpointError: with another tokenizer, weights load without error and are useless."""
    trained_with = source.tokenizer
    given = tokenizer.identity.model_dump() if tokenizer else None
    if given and trained_with and given != trained_with:

        def describe(identity: dict[str, Any]) -> str:
            return ", ".join(f"{k} {value}" for k, value in identity.items() if value is not None)

        raise CheckpointError(
            f"{source.path}: trained with the tokenizer {describe(trained_with)}; that of the data "
            f"is {describe(given)}; name data prepared with the former with --data SHARDS"
        )


def copy_tensors(
    source: WeightSource,
    regions: dict[tuple[str, str], TensorRegion],
    workers: int,
    report: ProgressReporter,
    what: str,
    allow_non_finite: bool = False,
) -> None:
    """Copy tensors of a source, by name and kind, to the regions of files. what: for progress.

    Raises CheckpointError if elements are not finite, unless `allow_non_finite`.
    """
    chunks = [
        (name, kind, start, stop)
        for name, kind in regions
        for _, start, stop in parameter_chunks(name, source.shapes[name])
    ]
    report.begin(what, 4 * sum(stop - start for *_, start, stop in chunks))
    source.close()
    copy = CopyChunk(source, regions, allow_non_finite)
    for _, elements in run_jobs(copy, chunks, workers):
        report.advance(4 * elements)


def export_config(source: WeightSource, dtype: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the contents of `config.json`: what is needed to use the weights."""
    identity = tokenizer.identity.model_dump() if tokenizer else source.tokenizer
    origin: dict[str, Any] = {"kind": source.format_name, "name": source.path.resolve().name}
    if isinstance(source, CheckpointSource):
        origin |= {key: source.manifest[key] for key in ("layout", "versions")}
    return {
        "format": "hg_scale export",
        "format_version": EXPORT_VERSION,
        "model": source.model.model_dump(),
        "precision": dtype,
        "parameters": source.parameters,
        "step": source.step,
        "tokenizer": identity,
        **({"images": list(source.images)} if source.images else {}),
        "source": origin,
        "hg_scale_version": __version__,
    }


def split_into_files(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Yield the names of each file: in order, at most `limit` bytes, at least one name."""
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group


def _create_files(
    folder: Path, source: WeightSource, dtype: str, shard_bytes: int, prefix: str
) -> dict[tuple[str, str], TensorRegion]:
    """Create the safetensors files without their data, and an index if there are several."""
    element = DTYPES[dtype][2]
    sizes = {name: element * prod(shape) for name, shape in source.shapes.items()}
    groups = list(split_into_files(sizes, shard_bytes))
    regions: dict[tuple[str, str], TensorRegion] = {}
    index: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = SAFETENSORS
        if len(groups) > 1:
            file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        shapes = [(prefix + name, source.shapes[name]) for name in names]
        created = create_safetensors(folder / file, shapes, dtype)
        for name in names:
            regions[name, "fp32"] = created[prefix + name]
            index[prefix + name] = file
    if len(groups) > 1:
        text = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
        (folder / SAFETENSORS_INDEX).write_text(json.dumps(text, indent=2) + "\n")
    return regions


def load_export(folder: Path) -> Hourglass:
    """Load an export as a plain model: on the CPU, memory-mapped, in the dtype of the files.

    Needs neither Megatron nor DeepSpeed. Raises CheckpointError if the export is not complete.
    """
    import torch

    source = ExportSource(folder)
    with torch.device("meta"):
        model = Hourglass(source.model, seed=None)
    weights = {name: source.stored_tensor(name) for name in source.shapes}
    model.load_state_dict(weights, assign=True)
    return model.eval()
