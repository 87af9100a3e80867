"""Exports: a folder of safetensors that loads with torch alone, and its loader.

    model.safetensors       weights under the model's own names; past a size in several files, with
                            an index in Hugging Face's layout
    config.json             the model section, where the weights come from, their tokenizer
    tokenizer.model         where the tokenizer has one
    README.md               what this is and how to load it

Rows that pad the vocabulary are kept: they are part of the model that the config describes, so an
export goes back to the very checkpoint that it came from.
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
from hg_scale.checkpoint.safetensors_file import DTYPES, TensorRegion, create
from hg_scale.convert.layerwise_forward import BOUND, largest_difference
from hg_scale.convert.model_card import model_card
from hg_scale.convert.output import new_folder
from hg_scale.convert.source import (
    CONFIG,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    CheckpointSource,
    ExportSource,
    WeightSource,
    pieces,
)
from hg_scale.data.tokenizer import MODEL_FILE, Tokenizer
from hg_scale.model.hourglass import Hourglass

EXPORT_VERSION = 1
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Style:
    """What a folder has beside or instead of a plain export's contents.

    `prefix` goes in front of every name, `config` into config.json, `files` are texts by name.
    """

    prefix: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


PLAIN = Style()


@dataclass(frozen=True)
class Copy:
    """Reads a piece of a parameter and puts it where it belongs; sent to the workers."""

    source: WeightSource
    places: dict[tuple[str, str], TensorRegion]  # by name and kind

    def __call__(self, piece: tuple[str, str, int, int]) -> int:
        """(name, kind, start, stop) -> its elements, written."""
        name, kind, start, stop = piece
        self.places[name, kind].write(start, self.source.read(name, kind, start, stop))
        return stop - start


def export(
    source: WeightSource,
    out: Path,
    *,
    dtype: str = "fp32",
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: Tokenizer | None = None,
    style: Style = PLAIN,
    report: ProgressReporter,
) -> float:
    """Write weights to the new folder `out`; the largest difference of the logits from theirs.

    Raises CheckpointError where the source is damaged or was trained with another tokenizer, where
    `out` cannot be written or, in fp32, computes something else.
    """
    _refuse_other_tokenizer(source, tokenizer)
    source.require_unchanged(workers, report)
    with new_folder(out) as folder:
        places = _make_files(folder, source, dtype, shard_bytes, style.prefix)
        copy_pieces(source, places, workers, report, "exporting")
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
                f"{difference:.2e} (at most {BOUND:.0e} may come of rounding)"
            )
    return difference


def _refuse_other_tokenizer(source: WeightSource, tokenizer: Tokenizer | None) -> None:
    """Weights with a tokenizer that they were not trained with load, and give nonsense."""
    theirs = source.tokenizer
    ours = tokenizer.identity.model_dump() if tokenizer else None
    if ours and theirs and ours != theirs:

        def words(identity: dict[str, Any]) -> str:
            told = (f"{key} {value}" for key, value in identity.items() if value is not None)
            return ", ".join(told)

        raise CheckpointError(
            f"{source.path}: trained with the tokenizer {words(theirs)}; that of the data is "
            f"{words(ours)}; name data made with the first with --data SHARDS"
        )


def copy_pieces(
    source: WeightSource,
    places: dict[tuple[str, str], TensorRegion],
    workers: int,
    report: ProgressReporter,
    what: str,
) -> None:
    """Fill files with what a source holds."""
    todo = [
        (name, kind, start, stop)
        for name, kind in places
        for _, start, stop in pieces(name, source.shapes[name])
    ]
    report.begin(what, 4 * sum(stop - start for *_, start, stop in todo))
    source.close()
    for _, elements in run_jobs(Copy(source, places), todo, workers):
        report.advance(4 * elements)


def export_config(source: WeightSource, dtype: str, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """`config.json`: all that is needed to use the weights."""
    identity = tokenizer.identity.model_dump() if tokenizer else source.tokenizer
    origin: dict[str, Any] = {"kind": source.what, "name": source.path.resolve().name}
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
    """Names in order, as many to a file as stay within `limit` bytes, one at least."""
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


def _make_files(
    folder: Path, source: WeightSource, dtype: str, shard_bytes: int, prefix: str
) -> dict[tuple[str, str], TensorRegion]:
    """The safetensors files, still empty, and the index where there are several."""
    element = DTYPES[dtype][2]
    sizes = {name: element * prod(shape) for name, shape in source.shapes.items()}
    groups = list(split_into_files(sizes, shard_bytes))
    places: dict[tuple[str, str], TensorRegion] = {}
    index: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = SAFETENSORS
        if len(groups) > 1:
            file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        shapes = [(prefix + name, source.shapes[name]) for name in names]
        made = create(folder / file, shapes, dtype)
        for name in names:
            places[name, "fp32"] = made[prefix + name]
            index[prefix + name] = file
    if len(groups) > 1:
        text = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
        (folder / SAFETENSORS_INDEX).write_text(json.dumps(text, indent=2) + "\n")
    return places


def load_export(folder: Path) -> Hourglass:
    """The plain model of an export, on the CPU, in the precision it is stored in, memory-mapped.

    Needs neither Megatron nor DeepSpeed. Raises CheckpointError where it is no whole export.
    """
    import torch

    source = ExportSource(folder)
    with torch.device("meta"):
        model = Hourglass(source.model, seed=None)
    weights = {name: source.stored_tensor(name) for name in source.shapes}
    model.load_state_dict(weights, assign=True)
    return model.eval()
