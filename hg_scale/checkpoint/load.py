"""Reading: the elements a rank needs, whatever layout wrote them, memory-mapped."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.find import damage, read_manifest
from hg_scale.checkpoint.fragments import (
    KINDS,
    Array,
    Fragment,
    Slice,
    assemble,
    cover_problems,
)


class Reader:
    """A checkpoint open for reading. Needs neither DeepSpeed nor a process group.

    Raises CheckpointError where the checkpoint is not whole.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.path = checkpoint
        self.manifest: dict[str, Any] = read_manifest(checkpoint)
        fault = damage(checkpoint)
        if fault:
            raise CheckpointError(f"{checkpoint}: {fault}")
        self._files: dict[str, Any] = {}
        self._place: dict[Fragment, tuple[str, int]] = {}
        self.written: dict[str, list[Fragment]] = defaultdict(list)
        for file in self.manifest["files"]:
            for number, data in enumerate(file["fragments"]):
                fragment = Fragment.from_json(data)
                self._place[fragment] = (file["name"], number)
                self.written[fragment.slice.name].append(fragment)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's whole shape."""
        return {name: fragments[0].slice.shape for name, fragments in self.written.items()}

    def read(self, kind: str, wanted: Fragment) -> Tensor:
        """Flat fp32 elements. Raises CheckpointError where the checkpoint lacks them."""

        def piece(fragment: Fragment, a: int, b: int) -> Array:
            name, number = self._place[fragment]
            return self._open(name).get_slice(f"{number}.{kind}")[a:b]

        written = self.written.get(wanted.slice.name, [])
        if written and written[0].slice.shape != wanted.slice.shape:
            raise CheckpointError(
                f"{self.path}: {wanted.slice.name} has shape {written[0].slice.shape}, the model "
                f"needs {wanted.slice.shape}"
            )
        try:
            return torch.from_numpy(assemble(wanted, written, piece))
        except (ValueError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: {kind} of {error}") from None

    def whole(self, name: str, kind: str = "fp32") -> Tensor:
        """One parameter, whole."""
        piece = Slice(name, self.shapes[name])
        return self.read(kind, Fragment(piece, 0, piece.size)).view(piece.shape)

    def _open(self, name: str) -> Any:
        if name not in self._files:
            path = self.path / name
            try:
                self._files[name] = safe_open(path, framework="np")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read: {error}") from None
        return self._files[name]


def read_parameters(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, whole, in fp32, one at a time: for a plain model."""
    reader = Reader(checkpoint)
    for name in reader.written:
        yield name, reader.whole(name)


def verify(checkpoint: Path) -> None:
    """Check that every byte is as written, every element there exactly once, and all are finite.

    Raises CheckpointError naming the first file or tensor that is not.
    """
    reader = Reader(checkpoint)
    for file in reader.manifest["files"]:
        path = checkpoint / file["name"]
        with path.open("rb") as data:
            if hashlib.file_digest(data, "sha256").hexdigest() != file["sha256"]:
                raise CheckpointError(f"{path}: changed since it was written (sha256 differs)")
    problems = cover_problems(f for fragments in reader.written.values() for f in fragments)
    if problems:
        raise CheckpointError(f"{checkpoint}: {problems[0]}")
    for name in reader.written:
        for kind in KINDS:
            if not torch.isfinite(reader.whole(name, kind)).all():
                raise CheckpointError(f"{checkpoint}: {kind} of {name} is not finite")
