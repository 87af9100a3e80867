"""A trained model loaded for inference: from a run, a checkpoint or an export, on one device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any, get_args

import torch

from hg_scale.bounded_read import BINARY_BYTES, format_errors, read_bounded
from hg_scale.checkpoint.find import find_latest, verify_checksums
from hg_scale.checkpoint.load import read_parameters
from hg_scale.checkpoint.manifest import MANIFEST, read_manifest
from hg_scale.checkpoint.run_tokenizer import load_run_tokenizer
from hg_scale.config.load import parse_config
from hg_scale.config.schema import ModelConfig
from hg_scale.config.training_sections import Precision
from hg_scale.convert.export import load_export
from hg_scale.convert.export_source import ExportSource
from hg_scale.convert.open import is_export
from hg_scale.data.index import Index, read_index
from hg_scale.data.protocol import FirstToken, SlidingWindows
from hg_scale.data.tokenizer import MODEL_FILE, Tokenizer, TokenizerIdentity, load_tokenizer
from hg_scale.errors import UserError
from hg_scale.evaluation.generation import TEMPERATURE, GenerationConfig, generate_texts
from hg_scale.evaluation.scoring import score_text
from hg_scale.model.hourglass import Hourglass
from hg_scale.model.sampling import Sampling

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, where they come from, and its tokenizer.

    `index` describes the model's data; it is None where the data is missing or an export names
    none. `exported_image_shape`: (height, width, channels), as recorded in an export of an image
    model.
    """

    model: Hourglass
    path: Path
    step: int
    index: Index | None
    open_tokenizer: Callable[[], Tokenizer]
    exported_image_shape: tuple[int, int, int] | None = None

    def __repr__(self) -> str:
        return (
            f"LoadedModel({str(self.path)!r}, step {self.step}, hierarchy "
            f"{self.config.hierarchy!r}, {self.device})"
        )

    @property
    def config(self) -> ModelConfig:
        """The architecture: the `model` section of the configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the training data. Raises UserError where it is unknown."""
        return self.open_tokenizer()

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(height, width, channels) of the images that the model generates; None for text."""
        return self.index.image_shape if self.index else self.exported_image_shape

    @property
    def data_source(self) -> str:
        """What messages about the data name: its location, or the model's folder if unknown."""
        return self.index.shown if self.index else str(self.path)

    def generate(
        self,
        prompt: str | bytes = "",
        tokens: int = 500,
        *,
        temperature: float = TEMPERATURE,
        top_k: int | None = None,
        top_p: float = 1.0,
        greedy: bool = False,
        seed: int = 1,
        context: int | None = None,
    ) -> str:
        """Return the text that follows `prompt`, without the prompt, up to `tokens` tokens.

        Arguments and defaults are those of `hg-scale generate`; `greedy` is temperature 0. The
        text ends early where the model ends the document. Raises UserError for a model of images
        and for values out of range.
        """
        sampling = Sampling(0.0 if greedy else temperature, top_k, top_p)
        config = GenerationConfig(sampling, tokens, seed, context=context)
        _check_range(config)
        prompts = [_as_bytes(prompt, "prompt")]
        return "".join(chunk.text for chunk in generate_texts(self, prompts, config))

    def bits_per_byte(
        self,
        text: str | bytes,
        *,
        window: int | None = None,
        stride: int | None = None,
        batch_size: int = 8,
        first_token: FirstToken = "previous",
    ) -> float:
        """Return the bits per byte of `text`, every token scored once.

        Windows of `window` tokens (default: the training sequence length), each starting `stride`
        tokens after the one before (default: `window`, no overlap), as in `hg-scale evaluate
        --data FILE`. `first_token`: the first input of each window, the token before it or, with
        "zero", id 0. Raises UserError for a model of images, an empty text or values out of range.
        """
        if self.image_shape is not None:
            raise UserError(
                f"{self.data_source}: contains images, so text cannot be scored; score images with "
                "`hg-scale evaluate`"
            )
        length = self.config.sequence_length if window is None else window
        stride = length if stride is None else stride
        if length < 1 or batch_size < 1:
            raise UserError(f"window={length}, batch_size={batch_size}: expected 1 or more")
        if not 1 <= stride <= length:
            raise UserError(f"stride={stride}: expected 1 to the window of {length} tokens")
        if first_token not in get_args(FirstToken):
            raise UserError(f"first_token={first_token!r}: expected 'previous' or 'zero'")
        data = _as_bytes(text, "text")
        if not data:
            raise UserError("text: is empty; expected at least one byte to score")
        protocol = SlidingWindows(length, stride)
        score = score_text(
            self.model, self.tokenizer, data, protocol, batch_size=batch_size,
            first_token=first_token,
        )  # fmt: skip
        return score.bits_per_byte


def _as_bytes(text: object, name: str) -> bytes:
    """UTF-8 of a string; bytes as they are. Raises UserError for anything else."""
    if isinstance(text, str):
        return text.encode(errors="surrogateescape")
    if not isinstance(text, bytes):
        raise UserError(f"{name}: expected a str or bytes, got {type(text).__name__}")
    return text


def _check_range(config: GenerationConfig) -> None:
    """Raise UserError for arguments of `LoadedModel.generate` that are out of range."""
    sampling = config.sampling
    problems = {
        f"tokens={config.tokens}: expected 1 or more": config.tokens < 1,
        f"temperature={sampling.temperature}: expected 0 or more": not (
            0 <= sampling.temperature < inf
        ),
        f"top_k={sampling.top_k}: expected 1 or more": sampling.top_k is not None
        and sampling.top_k < 1,
        f"top_p={sampling.top_p}: expected more than 0, up to 1": not 0 < sampling.top_p <= 1,
        f"context={config.context}: expected 2 or more": config.context is not None
        and config.context < 2,
    }
    for problem, found in problems.items():
        if found:
            raise UserError(problem)


def load(
    folder: str | Path,
    data: str | Path | None = None,
    precision: Precision = "fp32",
    device: str | None = None,
) -> LoadedModel:
    """Load a trained model from a run folder (its newest checkpoint), a checkpoint or an export.

    `data`: prepared corpus to use instead of the run's. `device`: default cuda if available, else
    cpu. Raises UserError where something is missing or does not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {problem}; name a run folder, a checkpoint folder or an export")
    if precision not in _DTYPES:
        raise UserError(f"precision={precision!r}: expected fp32 or bf16")
    target = _parse_device(device)
    location = None if data is None else str(data)
    loaded = (_load_export if is_export(folder) else _load_checkpoint)(folder, location)
    index, vocab_size = loaded.index, loaded.config.vocab_size
    if index is not None and index.vocab_size > vocab_size:
        raise UserError(
            f"{index.shown}: has a vocabulary of {index.vocab_size}, the model of "
            f"{loaded.path} one of {vocab_size}; name the data it was trained on with --data"
        )
    loaded.model.to(target, _DTYPES[precision])
    return loaded


def _parse_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name!r}: expected cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name!r}: no GPU is available; use cpu")
    return device


def _load_checkpoint(folder: Path, data: str | None) -> LoadedModel:
    checkpoint = find_latest(folder / "checkpoints", lambda line: print(line, file=sys.stderr))
    if checkpoint is None:
        if (folder / "config.json").is_file():
            raise UserError(f"{folder}: a run without a checkpoint; train until its first one")
        if not (folder / MANIFEST).is_file():
            raise UserError(
                f"{folder}: expected a run folder (with config.json and checkpoints/), a complete "
                f"checkpoint folder (with {MANIFEST}) or an export"
            )
        checkpoint = folder
    manifest = read_manifest(checkpoint)
    if problem := verify_checksums(checkpoint):
        raise UserError(f"{checkpoint}: {problem}; use another checkpoint")
    config = parse_config({"model": manifest["config"]["model"]}, source=str(checkpoint))
    identity, step = manifest.get("tokenizer"), manifest["step"]
    try:
        index = (
            read_index(data)
            if data
            else _index_of_section(manifest["config"].get("data", {}), checkpoint)
        )
    except UserError:
        tokenizer = None if data else load_run_tokenizer(checkpoint, identity)
        if tokenizer is None:
            raise
        model = load_model(config.model, checkpoint)
        return LoadedModel(model, checkpoint, step, None, lambda: tokenizer)
    require_same_tokenizer(index, identity, checkpoint)
    model = load_model(config.model, checkpoint)
    return LoadedModel(model, checkpoint, step, index, index.open_tokenizer)


def _load_export(folder: Path, data: str | None) -> LoadedModel:
    source, index = ExportSource(folder), read_index(data) if data else None
    identity = source.tokenizer

    def open_tokenizer() -> Tokenizer:
        if identity is None:
            raise UserError(
                f"{folder}: names no tokenizer; give --data SHARDS, or export with --data"
            )
        file = folder / MODEL_FILE
        with format_errors(file, UserError):
            content = read_bounded(file, BINARY_BYTES) if file.is_file() else None
        return load_tokenizer(TokenizerIdentity.model_validate(identity), content)

    if index is not None:
        require_same_tokenizer(index, identity, folder)
        if source.images and index.image_shape != source.images:
            content = f"images of {index.image_shape}" if index.image_shape else "text"
            raise UserError(
                f"{index.shown}: contains {content}, but {folder} generates images of "
                f"{source.images} (height, width, channels)"
            )
        open_tokenizer = index.open_tokenizer
    return LoadedModel(
        load_export(folder), folder, source.step, index, open_tokenizer, source.images
    )


def require_same_tokenizer(index: Index, identity: dict[str, Any] | None, model_path: Path) -> None:
    """Raise UserError where the data was made with another tokenizer than the model's, if known.

    Scores across tokenizers would look plausible and mean nothing.
    """
    of_data = index.tokenizer.model_dump()
    is_text = index.document_tokens is None
    if identity is not None and is_text and identity["name"] == of_data["name"] == "bytes":
        return  # bytes have the same ids with and without an end-of-document token
    if identity is not None and identity != of_data:
        raise UserError(
            f"{index.shown}: made with another tokenizer ({of_data['name']}, vocabulary "
            f"{of_data['vocab_size']}) than {model_path} ({identity['name']}, vocabulary "
            f"{identity['vocab_size']}); prepare the text again with the model's tokenizer"
        )


def _index_of_section(section: dict[str, object], checkpoint: Path) -> Index:
    """Read the index of the first corpus in the `data` section of a checkpoint's configuration."""
    sources = section.get("sources")
    first = sources[0] if isinstance(sources, list) and sources else section
    path = first.get("path")
    if not isinstance(path, str):
        raise UserError(f"{checkpoint}: names no data; give --data SHARDS")
    return read_corpus_index(path)


def read_corpus_index(path: str) -> Index:
    """Read the index of a run's corpus; refuse a `pipe:` command, which must not be executed."""
    if path.startswith("pipe:"):
        raise UserError(f"the run's data is a command, which is not executed here: {path}")
    return read_index(path)


def load_model(config: ModelConfig, checkpoint: Path) -> Hourglass:
    """Return the unsharded model with a checkpoint's weights, in fp32 on the CPU."""
    with torch.device("meta"):  # no memory for weights that the checkpoint's replace
        model = Hourglass(config, seed=None)
    model.load_state_dict(dict(read_parameters(checkpoint)), assign=True)
    return model.eval()
