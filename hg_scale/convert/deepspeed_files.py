"""Reading what DeepSpeed writes: its universal format, and consolidated fp32 weights.

These are pickles. They are read by torch's restricted unpickler, which makes tensors, containers
and plain values and calls nothing else; whatever asks for more is refused. Needs no DeepSpeed.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.fragments import KINDS
from hg_scale.config.schema import ModelConfig
from hg_scale.convert.source import (
    SAFETENSORS,
    SAFETENSORS_INDEX,
    SafetensorsFiles,
    WeightSource,
    files_by_name,
    model_of,
)
from hg_scale.model.hourglass import parameter_shapes

LATEST, ZERO = "latest_universal", "zero"
TORCH_FILE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
OURS = "hg_scale"  # what `to-deepspeed` adds to the model states
_ALLOWED: list[Any] = [OrderedDict, torch.Size]  # beyond tensors, containers and plain values
_FORBIDDEN = re.compile(r"(?:GLOBAL|function|class|global)\s+`?([\w.]+)`?\s+(?:was not|whose)")


def load_pickle(path: Path) -> Any:
    """What a file of `torch.save` holds, tensors memory-mapped, nothing of it executed.

    Raises CheckpointError where it holds more than tensors, containers and plain values.
    """
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        found = _FORBIDDEN.search(str(error))
        what = f"it asks for {found[1]}" if found else "it is no plain file of torch.save"
        raise CheckpointError(
            f"{path}: refused, nothing of it was run: {what}; expected tensors and plain values"
        ) from None
    except Exception as error:  # a broken file may raise anything
        line = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: cannot be read as a file of torch.save: {line}") from None


class UniversalSource(WeightSource):
    """A folder in DeepSpeed's universal format: `zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt`.

    `model` is needed where `to-deepspeed` did not write it, which says it itself.
    """

    what = "universal checkpoint"

    def __init__(self, path: Path, model: ModelConfig | None = None) -> None:
        self.folder = universal_folder(path)
        zero = self.folder / ZERO
        names = sorted(str(p.parent.relative_to(zero)) for p in zero.glob("**/fp32.pt"))
        states = self._states()
        ours = states.get(OURS) or {}
        if not isinstance(ours, dict):
            raise CheckpointError(f"{self.folder}: {OURS} is no object in its model states")
        if model is None:
            if "model" not in ours:
                raise CheckpointError(
                    f"{path}: does not say which model it is of; from-deepspeed --config FILE does"
                )
            model = model_of(ours["model"], self.folder)
        self._shapes = parameter_shapes(model)
        self._cached: tuple[tuple[str, str] | None, Tensor] = (None, torch.empty(0))
        stored = {name: self._shape(name) for name in names}
        super().__init__((path, model), path, model, stored)
        first = zero / self.stored_names[next(iter(self.shapes))]
        self.kinds = tuple(kind for kind in KINDS if (first / f"{kind}.pt").exists())
        if self.kinds != KINDS:
            self.kinds = ("fp32",)
        self.step = _whole_number(states.get("global_steps", 0), self.folder)
        self.optimizer_step = self.step
        if (first / "step.pt").exists():
            self.optimizer_step = _whole_number(load_pickle(first / "step.pt"), first / "step.pt")
        unknown = {"step": self.step, "position": 0, "skipped": 0, "data": {}}
        self.progress, self.tokenizer = ours.get("progress", unknown), ours.get("tokenizer")
        config = ours.get("config")
        self.config = config if isinstance(config, dict) else None

    def _read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        return self._tensor(self.stored_names[name], kind).reshape(-1)[start:stop].float()

    def close(self) -> None:
        self._cached = (None, torch.empty(0))

    def _states(self) -> dict[str, Any]:
        """The model states beside the weights, if there are any."""
        found = sorted(self.folder.glob("*model_states.pt"))
        states = load_pickle(found[0]) if found else {}
        if not isinstance(states, dict):
            raise CheckpointError(f"{found[0]}: expected an object")
        return states

    def _shape(self, name: str) -> tuple[int, ...]:
        """DeepSpeed lays parameters flat where they come from ZeRO 3."""
        shape = tuple(self._tensor(name, "fp32").shape)
        whole = self._shapes.get(name, shape)
        flat = len(shape) == 1 and len(whole) > 1 and shape[0] % (rest := _size(whole[1:])) == 0
        return (shape[0] // rest, *whole[1:]) if flat else shape

    def _tensor(self, name: str, kind: str) -> Tensor:
        if self._cached[0] != (name, kind):
            path = self.folder / ZERO / name / f"{kind}.pt"
            value = load_pickle(path)
            tensor = value.get("param") if isinstance(value, dict) else value
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise CheckpointError(f"{path}: holds no tensor of numbers")
            self._cached = ((name, kind), tensor)
        return self._cached[1]


class ConsolidatedSource(WeightSource):
    """One state dict: what DeepSpeed's `zero_to_fp32` writes, as torch's files or safetensors.

    `path`: the file, or the folder with it (or with the files that its index lists).
    """

    what = "state dict"

    def __init__(self, path: Path, model: ModelConfig | None = None) -> None:
        if model is None:
            raise CheckpointError(
                f"{path}: does not say which model it is of; from-deepspeed --config FILE does"
            )
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
        self._place = dict(files_by_name(path, TORCH_FILE, TORCH_INDEX, self._load))
        self.shapes = {name: tuple(self.tensor(name).shape) for name in self._place}

    def tensor(self, name: str) -> Tensor:
        file = self._place[name]
        tensors = self._load(file)
        if name not in tensors:
            raise CheckpointError(f"{file}: {name} is missing")
        return tensors[name]

    def close(self) -> None:
        self._loaded.clear()

    def _load(self, file: Path) -> dict[str, Tensor]:
        if file not in self._loaded:
            value = load_pickle(file)
            while isinstance(value, dict) and len(value) == 1:  # {"module": ...}
                inner = next(iter(value.values()))
                if not isinstance(inner, dict):
                    break
                value = inner
            if not isinstance(value, dict) or not all(
                isinstance(t, Tensor) for t in value.values()
            ):
                raise CheckpointError(f"{file}: expected a state dict, tensors by name")
            self._loaded[file] = value
        return self._loaded[file]


def universal_folder(path: Path) -> Path:
    """The folder with `zero/`: `path` itself, or what its `latest_universal` names."""
    if (path / ZERO).is_dir():
        return path
    try:
        tag = (path / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / LATEST}: cannot be read: {error}") from None
    if Path(tag).name != tag or not (path / tag / ZERO).is_dir():
        raise CheckpointError(f"{path / LATEST}: names {tag!r}, which is no universal checkpoint")
    return path / tag


def _whole_number(value: Any, where: Path) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, RuntimeError):
        raise CheckpointError(f"{where}: expected a number of steps") from None


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
