"""Weights to be converted: whole parameters by name, read a piece at a time.

What they lie in (a checkpoint, an export, a golden file, DeepSpeed's files) is the business of the
subclasses; `open_source` finds the right one. Nothing here reads more than it is asked for, so
what a conversion needs in memory is a piece, not a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hg_scale.checkpoint.checksum import changed_files
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.fragments import KINDS, Fragment, Slice
from hg_scale.checkpoint.jobs import ProgressReporter
from hg_scale.checkpoint.load import CheckpointReader
from hg_scale.config.errors import ConfigError
from hg_scale.config.load import parse_config
from hg_scale.config.schema import ModelConfig
from hg_scale.convert.reference import read_entries, reference_config, reference_weights, under
from hg_scale.model.hourglass import parameter_shapes

PIECE_ELEMENTS = (
    1 << 20
)  # elements read at once: 4 MiB in fp32; larger ones are slower, each a new mapping
CONFIG = "config.json"
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
_PREFIXES = ("model.", "module.", "module.model.")  # of wrappers around the model


class WeightSource:
    """Parameters of `model` by name. Cheap to open; sent to a worker, it is opened again there.

    `kinds`: "fp32", and Adam's moments where it holds them. `step`, `optimizer_step`, `progress`
    (where training stands, None unknown), `config` (of the run, as JSON has it, None unknown),
    `tokenizer` (its identity) and `images` (height, width, channels of what it draws; None for
    text, and unknown) are what is known beside the weights. Raises CheckpointError where the
    parameters are not those of `model`.
    """

    kinds: tuple[str, ...] = ("fp32",)
    what = "weights"

    def __init__(
        self, arguments: tuple[Any, ...], path: Path, model: ModelConfig, stored: dict[str, Any]
    ) -> None:
        self._arguments = arguments
        self.path, self.model = path, model
        self.shapes = parameter_shapes(model)
        self.stored_names = _match_names(path, stored, self.shapes)
        self.stored = {n: tuple(stored[theirs]) for n, theirs in self.stored_names.items()}
        for name, shape in self.shapes.items():
            self._check_shape(name, self.stored[name], shape)
        self.step = self.optimizer_step = 0
        self.progress: dict[str, Any] | None = None
        self.config: dict[str, Any] | None = None
        self.tokenizer: dict[str, Any] | None = None
        self.images: tuple[int, int, int] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    @property
    def parameters(self) -> int:
        """Elements of all parameters, the padding of the vocabulary counted."""
        return sum(map(prod, self.shapes.values()))

    def read(
        self, name: str, kind: str = "fp32", start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Flat fp32 elements [start, stop) of a parameter.

        Rows that pad the vocabulary are zeros where the source lacks them. Raises CheckpointError
        where it cannot be read.
        """
        size, held = prod(self.shapes[name]), prod(self.stored[name])
        stop = size if stop is None else stop
        if stop <= held:
            return self._read(name, kind, start, stop)
        result = torch.zeros(stop - start)
        if start < held:
            result[: held - start] = self._read(name, kind, start, held)
        return result

    def whole(self, name: str, kind: str = "fp32") -> Tensor:
        """One parameter, whole, in fp32."""
        return self.read(name, kind).view(self.shapes[name])

    def require_unchanged(self, workers: int, report: ProgressReporter) -> None:
        """Raise CheckpointError where bytes are not those that were written, by their checksums.

        What carries no checksums is taken as it is.
        """

    def close(self) -> None:
        """Let go of open files; reading opens them again."""

    def _read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        raise TypeError(f"{type(self).__name__} defines no _read")

    def _check_shape(self, name: str, stored: tuple[int, ...], shape: tuple[int, ...]) -> None:
        rows = (self.model.vocab_size, *shape[1:])
        padded = name.startswith(("embedding.", "head.")) and shape[0] == self.model.padded_vocab
        if stored != shape and not (padded and stored == rows):
            raise CheckpointError(
                f"{self.path}: {name} has shape {stored}, the model '{self.model.hierarchy}' needs "
                f"{shape}"
            )


def pieces(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int, int]]:
    """(name, start, stop) of the pieces that a parameter is read in."""
    size = prod(shape)
    for start in range(0, size, PIECE_ELEMENTS):
        yield name, start, min(size, start + PIECE_ELEMENTS)


def model_of(tree: Any, where: Path) -> ModelConfig:
    """The model section of a file's JSON. Raises CheckpointError where it is none of ours."""
    try:
        return parse_config({"model": tree}).model
    except ConfigError as error:
        faults = "; ".join(map(str, error.problems))
        raise CheckpointError(f"{where}: model: {faults}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """An object. Raises CheckpointError where the file holds none."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return tree


def _match_names(path: Path, stored: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """Our names to those of the file, which may have the prefix of a wrapper in front."""
    stored, wanted = set(stored), list(wanted)
    prefixes = [p for p in _PREFIXES if all(name.startswith(p) for name in stored)]
    prefix = max(prefixes, key=len, default="")
    for name in wanted:
        if prefix + name not in stored:
            raise CheckpointError(f"{path}: {name} is missing; is it of another model?")
    left = sorted(stored - {prefix + name for name in wanted})
    if left:
        raise CheckpointError(f"{path}: the model has no use for {left[0]}")
    return {name: prefix + name for name in wanted}


class CheckpointSource(WeightSource):
    """A checkpoint of ours, whatever layout wrote it."""

    what = "checkpoint"

    def __init__(self, path: Path) -> None:
        self.reader = CheckpointReader(path)
        self.manifest = manifest = self.reader.manifest
        model = model_of(manifest["config"]["model"], path)
        super().__init__((path,), path, model, self.reader.shapes)
        self.step, self.optimizer_step = manifest["step"], manifest["optimizer_step"]
        self.progress: dict[str, Any] = manifest["progress"]
        self.kinds = KINDS if manifest.get("moments", True) else KINDS[:1]  # else all zeros
        self.config = manifest["config"]
        # Runs keep it with their data's state, too; before they did elsewhere, only there.
        data = self.progress.get("data") or {}
        self.tokenizer = manifest.get("tokenizer") or data.get("tokenizer") or None

    def require_unchanged(self, workers: int, report: ProgressReporter) -> None:
        for fault in changed_files(self.path, self.manifest["files"], workers, report):
            raise CheckpointError(f"{fault}; use another checkpoint")

    def _read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        wanted = Fragment(Slice(name, self.shapes[name]), start, stop - start)
        return self.reader.read(kind, wanted)


class ExportSource(WeightSource):
    """An export, or a folder in Hugging Face's style."""

    what = "export"

    def __init__(self, path: Path) -> None:
        self.described = config = read_json_object(path / CONFIG)
        if "model" not in config:
            raise CheckpointError(f"{path / CONFIG}: no export of ours: it has no model section")
        self._files = SafetensorsFiles(path)
        model = model_of(config["model"], path / CONFIG)
        super().__init__((path,), path, model, self._files.shapes)
        self.step, self.tokenizer = config.get("step", 0), config.get("tokenizer")
        if shape := config.get("images"):
            height, width, channels = shape
            self.images = (height, width, channels)

    def _read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        return self._files.tensor(self.stored_names[name]).view(-1)[start:stop].float()

    def stored_tensor(self, name: str) -> Tensor:
        """A parameter as it lies in the file, memory-mapped, in its own dtype."""
        return self._files.tensor(self.stored_names[name]).view(self.shapes[name])

    def close(self) -> None:
        self._files.close()


class GoldenSource(WeightSource):
    """A golden file of the reference implementation."""

    what = "golden file"

    def __init__(self, path: Path) -> None:
        try:
            entries = read_entries(path, "config")
            model = reference_config(str(entries["config"]))
            self._weights = reference_weights(under(entries, "weight/"), model)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        shapes = {name: value.shape for name, value in self._weights.items()}
        super().__init__((path,), path, model, shapes)

    def _read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        return torch.from_numpy(self._weights[name].reshape(-1)[start:stop].copy()).float()


class SafetensorsFiles:
    """The tensors of a folder's `model.safetensors`, or of the files that its index lists."""

    def __init__(self, path: Path) -> None:
        """`path`: the folder, or one safetensors file."""
        self._open: dict[Path, Any] = {}
        self._place: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, file in files_by_name(path, SAFETENSORS, SAFETENSORS_INDEX, self._names):
            self._place[name] = file
            try:
                self.shapes[name] = tuple(self._handle(file).get_slice(name).get_shape())
            except SafetensorError:
                raise CheckpointError(f"{file}: {name} is missing") from None

    def tensor(self, name: str) -> Tensor:
        """Memory-mapped: its pages are the file's."""
        return self._handle(self._place[name]).get_tensor(name)

    def close(self) -> None:
        self._open.clear()

    def _names(self, file: Path) -> Iterable[str]:
        return self._handle(file).keys()

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file}: cannot be read: {error}") from None
        return self._open[file]


def files_by_name(path: Path, single: str, index: str, names: Any) -> Iterator[tuple[str, Path]]:
    """(tensor, file that holds it) of a file, of a folder's `single`, or as its `index` lists them.

    `names(file)` gives the names in one file.
    """
    file = path / single if path.is_dir() else path
    if path.is_dir() and (path / index).exists():
        listed = read_json_object(path / index).get("weight_map")
        if not isinstance(listed, dict):
            raise CheckpointError(f"{path / index}: has no weight_map")
        for name, where in listed.items():
            if not isinstance(where, str) or Path(where).name != where:
                raise CheckpointError(f"{path / index}: {name} is said to be in {where!r}")
            yield name, path / where
        return
    for name in names(file):
        yield name, file
