"""A checkpoint of any parameters, judged: `convert verify` wants those of a whole model."""

from __future__ import annotations

from pathlib import Path

import torch

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.find import content_damage
from hg_scale.checkpoint.fragments import KINDS, cover_problems
from hg_scale.checkpoint.load import CheckpointReader


def verify(checkpoint: Path) -> None:
    """Raise CheckpointError naming the first file or tensor that is not as written and finite."""
    if fault := content_damage(checkpoint):
        raise CheckpointError(f"{checkpoint}: {fault}")
    reader = CheckpointReader(checkpoint)
    problems = cover_problems(f for fragments in reader.written.values() for f in fragments)
    if problems:
        raise CheckpointError(f"{checkpoint}: {problems[0]}")
    for name in reader.written:
        for kind in KINDS:
            if not torch.isfinite(reader.whole(name, kind)).all():
                raise CheckpointError(f"{checkpoint}: {kind} of {name} is not finite")
