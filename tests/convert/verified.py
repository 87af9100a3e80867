"""Verify a checkpoint of any parameters; `convert verify` requires those of a complete model."""

from __future__ import annotations

from pathlib import Path

import torch

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.find import verify_checksums
from hg_scale.checkpoint.fragments import KINDS, coverage_problems
from hg_scale.checkpoint.load import CheckpointReader


def verify(checkpoint: Path) -> None:
    """Raise CheckpointError naming the first file or tensor that is corrupt or not finite."""
    if problem := verify_checksums(checkpoint):
        raise CheckpointError(f"{checkpoint}: {problem}")
    reader = CheckpointReader(checkpoint)
    problems = coverage_problems(f for fragments in reader.fragments.values() for f in fragments)
    if problems:
        raise CheckpointError(f"{checkpoint}: {problems[0]}")
    for name in reader.fragments:
        for kind in KINDS:
            if not torch.isfinite(reader.full_tensor(name, kind)).all():
                raise CheckpointError(f"{checkpoint}: {kind} of {name} is not finite")
