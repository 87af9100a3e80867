"""DeepSpeed's files as sources of weights: its universal format, and consolidated fp32 weights.

These are pickles. torch's restricted unpickler reads them: it constructs tensors, containers and
plain values only, and a file that refers to anything else is refused. Needs no DeepSpeed.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from hg_scale.bounded_read import (
    RECORD_BYTES,
    FileName,
    FormatError,
    as_json,
    format_errors,
    read_text,
    require_regular,
    show_value,
    validated,
)
from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.fragments import KINDS
from hg_scale.checkpoint.manifest import ProgressEntry
from hg_scale.config.schema import ModelConfig
from hg_scale.convert.export_source import (
    SAFETENSORS,
    SAFETENSORS_INDEX,
    SafetensorsFiles,
    files_by_tensor,
)
from hg_scale.convert.source import WeightSource, parse_model
from hg_scale.data.tokenizer import TokenizerIdentity
from hg_scale.model.hourglass import parameter_shapes

LATEST_UNIVERSAL, ZERO_FOLDER = "latest_universal", "zero"
TORCH_FILE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
EXTRA_STATE = "hg_scale"  # the key that `to-deepspeed` adds to the model states
_ALLOWED: list[Any] = [OrderedDict, torch.Size]  # beyond tensors, containers and plain values
_MAX_PICKLE = 1 << 24  # bytes of the pickle beside the tensors, which expands in memory
_MAX_WRAPPERS = 8  # dicts of one entry around a state dict
_MAX_STEPS = 1 << 62
_FORBIDDEN = re.compile(r"(?:GLOBAL|function|class|global)\s+`?([\w.]+)`?\s+(?:was not|whose)")


def load_pickle(path: Path) -> Any:
    """Load a file of `torch.save`, tensors memory-mapped, without executing anything in it.

    Raises CheckpointError if it holds more than tensors, containers and plain values.
    """
    try:
        require_regular(path)
        _refuse_bomb(path)
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        found = _FORBIDDEN.search(str(error))
        what = f"it refers to {found[1]}" if found else "it is not a plain file of torch.save"
        raise CheckpointError(
            f"{path}: refused, nothing was executed: {what}; expected tensors and plain values"
        ) from None
    except Exception as error:  # a corrupt file may raise anything
        line = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: cannot be read as a file of torch.save: {line}") from None


def _refuse_bomb(path: Path) -> None:
    """Raise FormatError if the archive would need much more memory than its size.

    torch.save does not compress; torch.load, however, expands what is compressed.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    expanded, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if expanded > size:
        raise FormatError(f"expected no compressed entries: {size:,} bytes hold {expanded:,}")
    pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if any(entry.file_size > _MAX_PICKLE for entry in pickles):
        raise FormatError(f"expected a data.pkl of at most {_MAX_PICKLE:,} bytes")


class _Extra(BaseModel):
    """What `to-deepspeed` adds to the model states; `parse_model` checks the model."""

    model_config = ConfigDict(strict=True)

    model: dict[str, Any] | None = None
    config: dict[str, dict[str, Any] | int | str] | None = None
    progress: ProgressEntry | Annotated[dict[str, Any], Field(max_length=0)] | None = None
    tokenizer: TokenizerIdentity | None = None


class UniversalSource(WeightSource):
    """A folder in DeepSpeed's universal format: `zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt`.

    `model` is needed unless `to-deepspeed` wrote the folder: it stores the model there.
    """

    format_name = "universal checkpoint"

    def __init__(self, path: Path, model: ModelConfig | None = None) -> None:
        self.folder = universal_folder(path)
        zero = self.folder / ZERO_FOLDER
        names = sorted(str(p.parent.relative_to(zero)) for p in zero.glob("**/fp32.pt"))
        states = self._states()
        extra = states.get(EXTRA_STATE) or {}
        if not isinstance(extra, dict):
            raise CheckpointError(
                f"{self.folder}: {EXTRA_STATE} is not an object in its model states"
            )
        with format_errors(self.folder, CheckpointError):
            extra = as_json(extra, (EXTRA_STATE,))
            parsed: _Extra = validated(_Extra, extra, (EXTRA_STATE,))
        if model is None:
            if parsed.model is None:
                raise _unknown_model(path)
            model = parse_model(parsed.model, self.folder)
        self._shapes = parameter_shapes(model)
        self._cached: tuple[tuple[str, str] | None, Tensor] = (None, torch.empty(0))
        stored = {name: self._shape(name) for name in names}
        super().__init__((path, model), path, model, stored)
        first = zero / self.stored_names[next(iter(self.shapes))]
        self.kinds = tuple(kind for kind in KINDS if (first / f"{kind}.pt").exists())
        if self.kinds != KINDS:
            self.kinds = ("fp32",)
        self.step = _integer(states.get("global_steps", 0), self.folder)
        self.optimizer_step = self.step
        if (first / "step.pt").exists():
            self.optimizer_step = _integer(load_pickle(first / "step.pt"), first / "step.pt")
        unknown = {"step": self.step, "position": 0, "skipped": 0, "data": {}}
        self.progress = extra.get("progress") or unknown
        if self.progress["step"] != self.step:
            found = f"progress.step: expected {self.step}, found {self.progress['step']}"
            raise CheckpointError(f"{self.folder}: {EXTRA_STATE}.{found}")
        self.tokenizer = parsed.tokenizer.model_dump() if parsed.tokenizer else None
        self.config = parsed.config

    def _read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        return self._tensor(self.stored_names[name], kind).reshape(-1)[start:stop].float()

    def close(self) -> None:
        self._cached = (None, torch.empty(0))

    def _states(self) -> dict[str, Any]:
        """Return the model states beside the weights; empty if there are none."""
        found = sorted(self.folder.glob("*model_states.pt"))
        states = load_pickle(found[0]) if found else {}
        if not isinstance(states, dict):
            raise CheckpointError(f"{found[0]}: expected an object")
        return states

    def _shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a stored parameter, which DeepSpeed flattens under ZeRO 3."""
        shape = tuple(self._tensor(name, "fp32").shape)
        full = self._shapes.get(name, shape)
        flat = len(shape) == 1 and len(full) > 1 and shape[0] % (rest := prod(full[1:])) == 0
        return (shape[0] // rest, *full[1:]) if flat else shape

    def _tensor(self, name: str, kind: str) -> Tensor:
        if self._cached[0] != (name, kind):
            path = self.folder / ZERO_FOLDER / name / f"{kind}.pt"
            value = load_pickle(path)
            tensor = value.get("param") if isinstance(value, dict) else value
            if (
                not isinstance(tensor, Tensor)
                or not tensor.is_floating_point()
                or tensor.layout is not torch.strided
            ):
                raise CheckpointError(f"{path}: expected a floating-point tensor")
            self._cached = ((name, kind), tensor)
        return self._cached[1]


class ConsolidatedSource(WeightSource):
    """One state dict: what DeepSpeed's `zero_to_fp32` writes, in torch's format or safetensors.

    `path`: the file, or the folder with it (or with the files that its index lists).
    """

    format_name = "state dict"

    def __init__(self, path: Path, model: ModelConfig | None = None) -> None:
        if model is None:
            raise _unknown_model(path)
        self._files: SafetensorsFiles | _TorchFiles
        folder = path.is_dir()
        safe = path.suffix == ".safetensors" or (
            folder and any((path / name).exists() for name in (SAFETENSORS, SAFETENSORS_INDEX))
        )
        self._files = SafetensorsFiles(path) if safe else _TorchFiles(path)
        super().__init__((path, model), path, model, self._files.shapes)

    def _read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        return self._files.tensor(self.stored_names[name]).reshape(-1)[start:stop].float()

    def close(self) -> None:
        self._files.close()


class _TorchFiles:
    """The tensors of `pytorch_model.bin`, or of the files that its index lists."""

    def __init__(self, path: Path) -> None:
        self._loaded: dict[Path, dict[str, Tensor]] = {}
        self._files = dict(files_by_tensor(path, TORCH_FILE, TORCH_INDEX, self._load))
        self.shapes = {name: tuple(self.tensor(name).shape) for name in self._files}

    def tensor(self, name: str) -> Tensor:
        file = self._files[name]
        tensors = self._load(file)
        if name not in tensors:
            raise CheckpointError(f"{file}: {name} is missing")
        return tensors[name]

    def close(self) -> None:
        self._loaded.clear()

    def _load(self, file: Path) -> dict[str, Tensor]:
        if file not in self._loaded:
            self._loaded[file] = _state_dict(load_pickle(file), file)
        return self._loaded[file]


def _state_dict(value: Any, file: Path) -> dict[str, Tensor]:
    """Return the tensors by name, out of at most `_MAX_WRAPPERS` dicts such as {"module": ...}."""
    for _ in range(_MAX_WRAPPERS):
        if not isinstance(value, dict) or len(value) != 1:
            break
        inner = next(iter(value.values()))
        if not isinstance(inner, dict):
            break
        value = inner
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a state dict (tensors by name)")
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            shown = show_value(name if isinstance(tensor, Tensor) else tensor)
            raise CheckpointError(f"{file}: expected a state dict (tensors by name), found {shown}")
        if not tensor.is_floating_point() or tensor.layout is not torch.strided:
            kind = f"{tensor.dtype}, {tensor.layout}"
            raise CheckpointError(f"{file}: {name}: expected a floating-point tensor, found {kind}")
    return value


def universal_folder(path: Path) -> Path:
    """Return the folder with `zero/`: `path` itself, or the one that `latest_universal` names.

    Raises CheckpointError if there is none.
    """
    if (path / ZERO_FOLDER).is_dir():
        return path
    try:
        tag = read_text(path / LATEST_UNIVERSAL, RECORD_BYTES).strip()
        validated(FileName, tag)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / LATEST_UNIVERSAL}: cannot be read: {error}") from None
    if not (path / tag / ZERO_FOLDER).is_dir():
        raise CheckpointError(
            f"{path / LATEST_UNIVERSAL}: names {tag!r}, which is not a universal checkpoint"
        )
    return path / tag


def _unknown_model(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: does not contain its model; use from-deepspeed --config FILE")


def _integer(value: Any, path: Path) -> int:
    try:
        count = int(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        count = -1
    if not 0 <= count < _MAX_STEPS:
        raise CheckpointError(f"{path}: expected a number of steps, found {show_value(value)}")
    return count
