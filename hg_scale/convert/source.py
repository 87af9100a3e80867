"""`WeightSource`: unsharded parameters by name, wherever they are stored.

Conversions read weights through this interface; `open_source` finds the right subclass for a path.
Only the requested elements are read, so a conversion needs memory for a chunk, not for a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hg_scale.bounded_read import TABLE_BYTES, format_errors, read_object
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.jobs import ProgressReporter
from hg_scale.config.errors import ConfigError
from hg_scale.config.load import parse_config
from hg_scale.config.schema import FREE_MODEL_KEYS, ModelConfig
from hg_scale.model.hourglass import parameter_shapes

CHUNK_ELEMENTS = 1 << 20  # 4 MiB in fp32; larger chunks are slower: each is a new memory mapping
_WRAPPER_PREFIXES = ("model.", "module.", "module.model.")


class WeightSource(ABC):
    """Parameters of a model by name. Cheap to open; unpickling in a worker opens it again.

    Attributes beside the weights, None where unknown: `step` and `optimizer_step` (0 if unknown);
    `progress` of the training run; `config`, the run's configuration as JSON; `tokenizer`, its
    identity; `images`, (height, width, channels) if the model was trained on images.
    """

    kinds: tuple[str, ...] = ("fp32",)
    """"fp32", and Adam's moments if the source has them."""
    format_name = "weights"

    def __init__(
        self, arguments: tuple[Any, ...], path: Path, model: ModelConfig, stored: dict[str, Any]
    ) -> None:
        """arguments: of the subclass, to open it again; stored: shapes by the names in the file.

        Raises CheckpointError if the stored parameters are not those of `model`.
        """
        self._arguments = arguments
        self.path, self.model = path, model
        self.shapes = parameter_shapes(model)
        self.stored_names = _match_names(path, stored, self.shapes)
        self.stored_shapes = {n: tuple(stored[name]) for n, name in self.stored_names.items()}
        for name, shape in self.shapes.items():
            self._check_shape(name, self.stored_shapes[name], shape)
        self.step = self.optimizer_step = 0
        self.progress: dict[str, Any] | None = None
        self.config: dict[str, Any] | None = None
        self.tokenizer: dict[str, Any] | None = None
        self.images: tuple[int, int, int] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    @property
    def paths(self) -> str:
        """Where the weights come from, for messages."""
        return str(self.path)

    @property
    def parameters(self) -> int:
        """Number of elements of all parameters, including the padding of the vocabulary."""
        return sum(map(prod, self.shapes.values()))

    def read(
        self, name: str, kind: str = "fp32", start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Return flat fp32 elements [start, stop) of a parameter, or of a moment of it.

        Vocabulary padding that the source lacks is zeros. Raises CheckpointError if it cannot be
        read.
        """
        size, stored = prod(self.shapes[name]), prod(self.stored_shapes[name])
        stop = size if stop is None else stop
        if stop <= stored:
            return self._read(name, kind, start, stop)
        result = torch.zeros(stop - start)
        if start < stored:
            result[: stored - start] = self._read(name, kind, start, stored)
        return result

    def full_tensor(self, name: str, kind: str = "fp32") -> Tensor:
        """Return an unsharded parameter, or a moment of it, in fp32."""
        return self.read(name, kind).view(self.shapes[name])

    def require_unchanged(self, workers: int, report: ProgressReporter) -> None:  # noqa: B027
        """Raise CheckpointError if the checksum of a file differs; formats without any pass."""

    def close(self) -> None:  # noqa: B027
        """Close open files; the next read opens them again."""

    @abstractmethod
    def _read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Return flat fp32 elements [start, stop) of what is stored."""

    def _check_shape(self, name: str, stored: tuple[int, ...], shape: tuple[int, ...]) -> None:
        unpadded = (self.model.vocab_size, *shape[1:])
        padded = name.startswith(("embedding.", "head.")) and shape[0] == self.model.padded_vocab
        if stored != shape and not (padded and stored == unpadded):
            raise CheckpointError(
                f"{self.path}: {name} has shape {stored}, the model '{self.model.hierarchy}' needs "
                f"{shape}"
            )


def require_usable(source: WeightSource, name: str, kind: str, values: Tensor) -> None:
    """Raise CheckpointError if training never produces these elements of a tensor.

    They are not finite, or negative second moments, whose root the optimizer takes.
    """
    not_finite = values.numel() - int(values.isfinite().sum())
    negative = int((values < 0).sum()) if kind == "exp_avg_sq" else 0
    if not_finite or negative:
        what = "not finite" if not_finite else "negative"
        raise CheckpointError(
            f"{source.paths}: {kind} of {name}: {not_finite or negative:,} of {values.numel():,} "
            f"elements read are {what}; `hg-scale convert verify` lists all, and imports "
            "write them as they are with --allow-non-finite"
        )


def parameter_chunks(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int, int]]:
    """Yield (name, start, stop) of the chunks in which a parameter is read."""
    size = prod(shape)
    for start in range(0, size, CHUNK_ELEMENTS):
        yield name, start, min(size, start + CHUNK_ELEMENTS)


def require_same_model(a: WeightSource, b: WeightSource) -> None:
    """Raise CheckpointError listing the configuration keys in which the models differ."""
    first, second = a.model.model_dump(), b.model.model_dump()
    keys = [k for k in first if k not in FREE_MODEL_KEYS and first[k] != second[k]]
    if keys:
        values = ", ".join(f"model.{k} ({first[k]!r} and {second[k]!r})" for k in keys)
        raise CheckpointError(f"{a.path} and {b.path}: of different models: {values}")


def parse_model(tree: Any, path: Path) -> ModelConfig:
    """Parse the model section of a JSON file. Raises CheckpointError naming `path`."""
    try:
        return parse_config({"model": tree}).model
    except ConfigError as error:
        problems = "; ".join(map(str, error.problems))
        raise CheckpointError(f"{path}: model: {problems}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError if the file holds none."""
    with format_errors(path, CheckpointError):
        return read_object(path, TABLE_BYTES)


def _match_names(path: Path, stored: Iterable[str], expected: Iterable[str]) -> dict[str, str]:
    """Map the model's parameter names to those in the file, which may have a wrapper's prefix."""
    stored, expected = set(stored), list(expected)
    prefixes = [p for p in _WRAPPER_PREFIXES if all(name.startswith(p) for name in stored)]
    prefix = max(prefixes, key=len, default="")
    for name in expected:
        if prefix + name not in stored:
            raise CheckpointError(f"{path}: {name} is missing; is it of another model?")
    unused = sorted(stored - {prefix + name for name in expected})
    if unused:
        raise CheckpointError(f"{path}: the model has no parameter {unused[0]}")
    return {name: prefix + name for name in expected}
