"""What a manifest has to say, so that whoever reads one may rely on it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class _Part(BaseModel):
    """Strict: what is of another type is a fault. More keys than these may be there."""

    model_config = ConfigDict(strict=True)


class _Fragment(_Part):
    name: str
    shape: list[int]
    dim: int | None
    index: int
    count: int = Field(ge=1)
    start: int = Field(ge=0)
    length: int = Field(ge=0)


class _File(_Part):
    name: str = Field(pattern=r"^[^/\\]+$")  # in the checkpoint's own folder
    bytes: int
    checksum: str = Field(pattern=r"^(xxh3_128:[0-9a-f]{32}|sha256:[0-9a-f]{64})$")
    fragments: list[_Fragment]


class _Progress(_Part):
    step: int
    position: int
    skipped: int
    data: dict[str, Any]


class _Layout(_Part):
    tensor: int
    pipeline: int
    data: int
    zero_stage: int


class _Config(_Part):
    model: dict[str, Any]


class _Manifest(_Part):
    step: int
    progress: _Progress
    optimizer_step: int
    layout: _Layout
    config: _Config
    versions: dict[str, str | None]
    files: list[_File]


def shape_fault(manifest: dict[str, Any]) -> str | None:
    """The first key that is missing or of another kind, in words; None where there is none."""
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return f"{where}: {first['msg'].lower()}"
    return None
