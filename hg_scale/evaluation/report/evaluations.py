"""Scores of checkpoints in `RUN/evaluation*.json`, as `hg-scale evaluate --json` writes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from hg_scale.bounded_read import TEXT_BYTES, FormatError, read_json

_NUMBER: TypeAdapter[float] = TypeAdapter(FiniteFloat)


@dataclass(frozen=True)
class Evaluation:
    """The score of the checkpoint of `step` on `text`, in windows with a stride, in tokens."""

    step: int
    text: str
    window: int
    stride: int
    bits_per_byte: float
    half_width: float | None  # of the 95% interval
    file: str


def read_evaluations(run: Path) -> list[Evaluation]:
    """Return the scores by text and step; what is not of this form is left out."""
    found = []
    for path in sorted(run.glob("evaluation*.json")):
        try:
            content = read_json(path, TEXT_BYTES)
        except (OSError, FormatError):
            continue
        results = content if isinstance(content, list) else [content]
        found += [one for result in results if (one := _evaluation(result, path.name))]
    return sorted(found, key=lambda one: (one.text, one.window, one.stride, one.step))


def _evaluation(result: Any, file: str) -> Evaluation | None:
    if not isinstance(result, dict) or not isinstance(result.get("text"), str):
        return None
    numbers = [result.get(key) for key in ("step", "window", "stride")]
    if not all(type(number) is int for number in numbers):
        return None
    step, window, stride = (int(number or 0) for number in numbers)
    half_width = result.get("interval_95_half_width")
    try:
        bits = _NUMBER.validate_python(result.get("bits_per_byte"), strict=True)
        half = None if half_width is None else _NUMBER.validate_python(half_width, strict=True)
    except ValidationError:
        return None
    return Evaluation(step, result["text"], window, stride, bits, half, file)
