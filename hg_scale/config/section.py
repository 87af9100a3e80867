"""Base class of the sections of a configuration, and numbers with bounds.

Every number has bounds. They are far from any useful value, and keep everything computed from it
finite and fast: an error is then reported here, not by an overflow in a running job.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1, le=1_000_000_000)]
NonNegative = Annotated[int, Field(ge=0, le=1_000_000_000)]
Width = Annotated[int, Field(ge=1, le=1_000_000)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Ratio = Annotated[float, Field(ge=0, le=1_000_000)]
Seconds = Annotated[float, Field(ge=0.001, le=10_000_000)]


class Section(BaseModel):
    """Base of all sections: immutable, without unknown keys or silent conversions."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, serialize_by_alias=True
    )
