"""The manifest entries beside step and files, for checkpoints written by hand."""

from __future__ import annotations

from typing import Any

META: dict[str, Any] = {
    "progress": {"step": 1, "position": 0, "skipped": 0, "data": {}},
    "optimizer_step": 7,
    "layout": {"tensor": 1, "pipeline": 1, "data": 1, "zero_stage": 1},
    "config": {"model": {}},
    "versions": {},
}


def meta(step: int) -> dict[str, Any]:
    """Return `META` for a checkpoint of this step."""
    return {**META, "progress": {**META["progress"], "step": step}}
