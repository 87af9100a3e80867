"""An export as a source of weights, and the safetensors files of a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hg_scale.bounded_read import Count, FileName, format_errors, validated
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.mapped_safetensors import map_safetensors
from hg_scale.convert.source import WeightSource, parse_model, read_json_object
from hg_scale.data.tokenizer import TokenizerIdentity

CONFIG = "config.json"
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F16", "BF16", "F32", "F64")


_Side = Annotated[int, Field(ge=1, le=1 << 20)]  # of an image, or its channels


class _ExportConfig(BaseModel):
    """The keys of config.json beside `model`, which `parse_model` checks."""

    model_config = ConfigDict(strict=True)

    step: Count = 0
    tokenizer: TokenizerIdentity | None = None
    images: Annotated[tuple[_Side, _Side, _Side], Field(strict=False)] | None = None
    precision: str | None = None


class ExportSource(WeightSource):
    """An export, or a Hugging Face folder of one. Raises CheckpointError if it is not complete."""

    format_name = "export"

    def __init__(self, path: Path) -> None:
        self.config_json = config = read_json_object(path / CONFIG)
        if "model" not in config:
            raise CheckpointError(f"{path / CONFIG}: not an export: it has no model section")
        with format_errors(path / CONFIG, CheckpointError):
            parsed: _ExportConfig = validated(_ExportConfig, config)
        self._files = SafetensorsFiles(path)
        model = parse_model(config["model"], path / CONFIG)
        super().__init__((path,), path, model, self._files.shapes)
        self.step, self.images = parsed.step, parsed.images
        self.tokenizer = parsed.tokenizer.model_dump() if parsed.tokenizer else None

    def _read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        return self._files.tensor(self.stored_names[name]).view(-1)[start:stop].float()

    def stored_tensor(self, name: str) -> Tensor:
        """Return a parameter as stored: memory-mapped, in the dtype of the file."""
        return self._files.tensor(self.stored_names[name]).view(self.shapes[name])

    def close(self) -> None:
        self._files.close()


class SafetensorsFiles:
    """The tensors of a folder's `model.safetensors`, or of the files that its index lists."""

    def __init__(self, path: Path) -> None:
        """path: the folder, or one safetensors file. Raises CheckpointError."""
        self._open: dict[Path, Any] = {}
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, file in files_by_tensor(path, SAFETENSORS, SAFETENSORS_INDEX, self._names):
            self._files[name] = file
            try:
                self.shapes[name] = tuple(self._handle(file).get_slice(name).get_shape())
            except SafetensorError:
                raise CheckpointError(f"{file}: {name} is missing") from None

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, memory-mapped, in the dtype of the file."""
        return self._handle(self._files[name]).get_tensor(name)

    def close(self) -> None:
        """Close all files; the next access opens them again."""
        self._open.clear()

    def _names(self, file: Path) -> Iterable[str]:
        return self._handle(file).keys()

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            _, entries, _ = map_safetensors(file)
            for name, entry in entries.items():
                if entry.dtype not in _FLOATS:
                    raise CheckpointError(
                        f"{file}: {name}: expected floating-point numbers, found {entry.dtype}"
                    )
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file}: cannot be read: {error}") from None
        return self._open[file]


def files_by_tensor(
    path: Path, single: str, index: str, names: Callable[[Path], Iterable[str]]
) -> Iterator[tuple[str, Path]]:
    """Yield (tensor, its file) for a file, for a folder's file `single`, or as its `index` lists.

    names(file) returns the names of the tensors in a file. Raises CheckpointError.
    """
    file = path / single if path.is_dir() else path
    if path.is_dir() and (path / index).exists():
        weight_map = read_json_object(path / index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{path / index}: has no weight_map")
        for name, file_name in weight_map.items():
            with format_errors(path / index, CheckpointError):
                validated(FileName, file_name, ("weight_map", name))
            yield name, path / file_name
        return
    for name in names(file):
        yield name, file
