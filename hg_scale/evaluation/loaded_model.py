"""A trained model to use: from a run, a checkpoint or an export, on one device, with its data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hg_scale.checkpoint.find import find_latest, verify_checksums
from hg_scale.checkpoint.load import read_parameters
from hg_scale.checkpoint.manifest import MANIFEST, read_manifest
from hg_scale.checkpoint.run_tokenizer import load_run_tokenizer
from hg_scale.config.load import parse_config
from hg_scale.config.schema import ModelConfig, Precision
from hg_scale.convert.export import load_export
from hg_scale.convert.export_source import ExportSource
from hg_scale.convert.open import is_export
from hg_scale.data.index import Index, read_index
from hg_scale.data.tokenizer import MODEL_FILE, Tokenizer, TokenizerIdentity, load_tokenizer
from hg_scale.errors import UserError
from hg_scale.model.hourglass import Hourglass

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, where they are from, and the index of its data.

    `index` is None where the data is not at hand, or an export was not told it. `images`: height,
    width, channels of what the model draws; None where it writes text.
    """

    model: Hourglass
    path: Path
    step: int
    index: Index | None
    open_tokenizer: Callable[[], Tokenizer]
    drawn: tuple[int, int, int] | None = None  # as an export says

    @property
    def images(self) -> tuple[int, int, int] | None:
        return self.index.image_shape if self.index else self.drawn

    @property
    def subject(self) -> str:
        """What a message about the data names: where it lies, or the model that knows of it."""
        return self.data or str(self.path)

    @property
    def data(self) -> str:
        """Where the data lies; empty where it is not known."""
        return self.index.location if self.index else ""


def load(
    folder: Path,
    data: str | None = None,
    precision: Precision = "fp32",
    device: str | None = None,
) -> LoadedModel:
    """The newest checkpoint of a run folder, a checkpoint folder, or an export.

    `data`: prepared corpus in place of that of the run. `device`: by default the GPU if there is
    one. Raises UserError where something is missing.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; name a run folder, a checkpoint folder or an export"
        )
    trained = _export(folder, data) if is_export(folder) else _checkpoint(folder, data)
    index, known = trained.index, trained.model.config.vocab_size
    if index is not None and index.vocab_size > known:
        raise UserError(
            f"{index.location}: has {index.vocab_size} kinds of tokens, the model of "
            f"{trained.path} knows {known}; name the data it was trained on with --data"
        )
    trained.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"), _DTYPES[precision])
    return trained


def _checkpoint(folder: Path, data: str | None) -> LoadedModel:
    checkpoint = find_latest(folder / "checkpoints")
    if checkpoint is None:
        if (folder / "config.json").is_file():
            raise UserError(f"{folder}: a run without a checkpoint; train it to its first one")
        if not (folder / MANIFEST).is_file():
            raise UserError(
                f"{folder}: expected a run folder (with config.json and checkpoints/), a "
                f"checkpoint folder whose save was finished (with {MANIFEST}) or an export"
            )
        checkpoint = folder
    manifest = read_manifest(checkpoint)
    if fault := verify_checksums(checkpoint):
        raise UserError(f"{checkpoint}: {fault}; use another checkpoint")
    config = parse_config({"model": manifest["config"]["model"]}, source=str(checkpoint))
    ours, step = manifest.get("tokenizer"), manifest["step"]
    try:
        index = (
            read_index(data) if data else _index_of(manifest["config"].get("data", {}), checkpoint)
        )
    except UserError:
        tokenizer = None if data else load_run_tokenizer(checkpoint, ours)
        if tokenizer is None:
            raise
        return LoadedModel(
            load_model(config.model, checkpoint), checkpoint, step, None, lambda: tokenizer
        )
    refuse_other_tokenizer(index, ours, checkpoint)
    model = load_model(config.model, checkpoint)
    return LoadedModel(model, checkpoint, step, index, index.open_tokenizer)


def _export(folder: Path, data: str | None) -> LoadedModel:
    source, index = ExportSource(folder), read_index(data) if data else None
    ours = source.tokenizer

    def open_tokenizer() -> Tokenizer:
        if ours is None:
            raise UserError(
                f"{folder}: names no tokenizer; give --data SHARDS, or export with --data"
            )
        file = folder / MODEL_FILE
        identity = TokenizerIdentity.model_validate(ours)
        return load_tokenizer(identity, file.read_bytes() if file.is_file() else None)

    if index is not None:
        refuse_other_tokenizer(index, ours, folder)
        if source.images and index.image_shape != source.images:
            held = f"images of {index.image_shape}" if index.image_shape else "text"
            raise UserError(f"{index.location}: holds {held}, but {folder} draws images of "
                            f"{source.images} (height, width, channels)")  # fmt: skip
        open_tokenizer = index.open_tokenizer
    return LoadedModel(
        load_export(folder), folder, source.step, index, open_tokenizer, source.images
    )


def refuse_other_tokenizer(index: Index, ours: dict[str, Any] | None, model: Path) -> None:
    """Raise UserError where the data was made with another tokenizer than the model's, if known.

    Scores would be numbers that look right.
    """
    theirs = index.tokenizer.model_dump()
    text = index.document_tokens is None
    if ours is not None and text and ours["name"] == theirs["name"] == "bytes":
        return  # a byte is the same token with ends of documents and without
    if ours is not None and ours != theirs:
        raise UserError(
            f"{index.location}: made with another tokenizer ({theirs['name']}, vocabulary "
            f"{theirs['vocab_size']}) than {model} ({ours['name']}, vocabulary "
            f"{ours['vocab_size']}); prepare the text again with the tokenizer of the model"
        )


def _index_of(section: dict[str, object], checkpoint: Path) -> Index:
    """The index of the data that a checkpoint's `data` section names first."""
    sources = section.get("sources")
    first = sources[0] if isinstance(sources, list) and sources else section
    path = first.get("path")
    if not isinstance(path, str):
        raise UserError(f"{checkpoint}: names no data of its own; give --data SHARDS")
    return index_of_run(path)


def index_of_run(path: str) -> Index:
    """The index of data that a run's folder names: looking at a run must not run a command."""
    if path.startswith("pipe:"):
        raise UserError(f"the run's data is a command, which is not run here: {path}")
    return read_index(path)


def load_model(config: ModelConfig, checkpoint: Path) -> Hourglass:
    """The plain model with a checkpoint's weights, in fp32."""
    with torch.device("meta"):  # no initial weights, which would only be thrown away
        model = Hourglass(config)
    model.load_state_dict(dict(read_parameters(checkpoint)), assign=True)
    return model.eval()
