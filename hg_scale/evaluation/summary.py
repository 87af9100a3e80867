"""Results of a run: its held-out bits per byte compared with compressors, and a sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.table import Table

from hg_scale.errors import UserError
from hg_scale.evaluation.generation import generate_sample
from hg_scale.evaluation.loaded_model import load
from hg_scale.evaluation.report.baselines import find_baselines
from hg_scale.evaluation.report.run_folder import read_runs


def comparison(run: Path, with_compressors: bool) -> Table:
    """Return a table of bits per byte on the held-out text: the run's last validation first.

    Raises UserError where the folder is not a run or no validation has a finite loss.
    """
    (folder,) = read_runs([run])
    values = folder.validation_column("validation_bits_per_byte")
    known = np.flatnonzero(np.isfinite(values))
    if not known.size:
        why = "no validation" if not len(values) else "no validation whose loss was finite"
        raise UserError(
            f"{run / 'metrics.jsonl'} holds {why}: train to the end, or set validate_every"
        )
    table = Table(title="held-out text, bits per byte (less is better)")
    table.add_column("model or compressor")
    table.add_column("bits per byte", justify="right")
    step = int(folder.validation_column("step")[known[-1]])
    name = f"hourglass {folder.setting('model.hierarchy')}, step {step}"
    table.add_row(name, f"{values[known[-1]]:.3f}", style="bold")
    if with_compressors:
        baselines, reasons = find_baselines([folder], lambda step: None)
        for one in baselines:
            table.add_row(one.compressor, f"{one.bits_per_byte:.3f}")
            table.caption = f"{one.bytes:,} bytes of held-out text"
        if not baselines:
            why = "; ".join(reasons) or "the run did not record what was scored"
            table.caption = f"no compressors: {why}"
    return table


def sample_text(run: Path, tokens: int, seed: int) -> str:
    """Generate text with the newest checkpoint, without a prompt."""
    return generate_sample(load(run), tokens, seed)
