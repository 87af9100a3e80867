"""Where training stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Where training stands: what a checkpoint carries beside weights and optimizer."""

    step: int = 0
    position: int = 0  # in the data, in tokens over all ranks
    skipped: int = 0  # bad steps, whose update was not made
    data: dict[str, Any] = field(default_factory=dict)  # of the schedule: `Batches.state`
