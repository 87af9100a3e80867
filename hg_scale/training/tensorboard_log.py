"""Logging to TensorBoard's files in `RUN/tensorboard`, beside `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hg_scale.errors import UserError

_QUEUE = 1000  # events that torch's writer thread may be behind
_NOT_SHOWN = ("step", "time", "start", "job")  # the axis, and what is no curve


class TensorBoardLog:
    """Writes the numbers of records as scalars; use it on one rank.

    Steps after `resume_step` of an earlier start disappear. A write that fails is one warning, and
    the last. Raises UserError if the package tensorboard is missing.
    """

    def __init__(self, run_dir: Path, resume_step: int, warn: Callable[[str], None]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "logging.tensorboard: the package tensorboard is needed "
                f"({str(error).splitlines()[0]}); install it with: pip install "
                "'hg-scale[tensorboard]', or set the key to false"
            ) from None
        self._warn, self._failed = warn, False
        folder = str(run_dir / "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=resume_step + 1, max_queue=_QUEUE)

    def log(self, record: Mapping[str, Any]) -> None:
        """Write the record of a step or a validation."""
        self._try(lambda: self._write(record))

    def _write(self, record: Mapping[str, Any]) -> None:
        for tag, value in scalars(record):
            self._writer.add_scalar(tag, value, record["step"])

    def close(self) -> None:
        """Write what is queued."""
        self._try(self._writer.close)

    def _try(self, write: Callable[[], Any]) -> None:
        if self._failed:
            return
        try:
            write()
        except Exception as error:  # a full disk, or an error of the package
            self._failed = True
            self._warn(f"tensorboard disabled: {' '.join(str(error).split())}; see metrics.jsonl")


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the tag and value of each number; those of lists and objects as `key/0`, `key/name`."""
    for key, value in record.items():
        if key in _NOT_SHOWN:
            continue
        if isinstance(value, list | tuple):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, Mapping):
            yield from ((f"{key}/{name}", item) for name, item in scalars(value))
        elif isinstance(value, int | float):
            yield key, float(value)
