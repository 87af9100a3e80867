"""From the data stream to each rank's tensors.

Only ranks that need tokens get them: the first and the last pipeline stage. Of these the first
rank of a tensor group reads, and gives the others theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hg_scale.config.errors import ConfigError, Problem
from hg_scale.config.schema import Config
from hg_scale.data.evaluation import evaluation_windows, split_bytes
from hg_scale.data.index import Index, read_index
from hg_scale.data.prefetch import Prefetcher
from hg_scale.data.stream import TrainingStream
from hg_scale.parallel.mesh import Mesh


def open_data(config: Config) -> Index:
    """The index that `data.path` names.

    Raises ConfigError where it does not suit the model, DataError where it cannot be read.
    """
    path = config.data.path
    if path is None:
        problem = Problem("data.path", "no data: set it to a folder made by data_prep/*.py", None)
        raise ConfigError([problem])
    if not _is_remote(path) and not Path(path).is_dir():
        problem = Problem(
            "data.path",
            "no such folder; make it with data_prep/prepare_bytes.py --input CORPUS --output "
            f"{path}",
            path,
        )
        raise ConfigError([problem])
    index = read_index(path)
    if index.vocab_size > config.model.vocab_size:
        problem = Problem(
            "model.vocab_size",
            f"the data in {path} has ids up to {index.vocab_size - 1}; use {index.vocab_size}",
            config.model.vocab_size,
        )
        raise ConfigError([problem])
    return index


def _is_remote(path: str) -> bool:
    return "://" in path or path.startswith("pipe:")


class Batches:
    """This rank's share of the global batches, in order.

    `position` counts the tokens consumed over all ranks, `epoch` the passes over the data.
    """

    def __init__(
        self, config: Config, index: Index, mesh: Mesh, device: torch.device, position: int
    ) -> None:
        self.mesh, self.device = mesh, device
        rows = config.training.global_batch_size // mesh.data
        self._shape = (rows, config.model.sequence_length + 1)
        self._tokens = config.training.global_batch_size * config.model.sequence_length
        self.position, self._epoch_tokens = position, index.split("train").tokens
        self.needed = mesh.is_first_stage or mesh.is_last_stage
        self._reader = None
        if self.needed and mesh.tensor_rank == 0:
            stream = TrainingStream(
                index,
                sequence_length=config.model.sequence_length,
                global_batch_size=config.training.global_batch_size,
                seed=config.training.seed,
                position=position,
                data_rank=mesh.data_rank,
                data_size=mesh.data,
            )
            self._reader = Prefetcher(stream, depth=config.data.prefetch_batches)

    @property
    def epoch(self) -> float:
        """Passes over the training split so far."""
        return self.position / self._epoch_tokens

    def next(self) -> Tensor | None:
        """(rows, L + 1) int64 on the device; None where no tokens are needed."""
        self.position += self._tokens
        if not self.needed:
            return None
        batch = torch.empty(self._shape, dtype=torch.int64, device=self.device)
        if self._reader:
            array, _ = self._reader.next()
            batch.copy_(torch.from_numpy(array))
        share_in_tensor_group(self.mesh, batch)
        return batch

    def close(self) -> None:
        """End the reading thread."""
        if self._reader:
            self._reader.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def share_in_tensor_group(mesh: Mesh, tensor: Tensor) -> None:
    """Give the first tensor rank's values to the others, in place."""
    if mesh.tensor > 1:
        from hg_scale.parallel.megatron import tensor_group

        dist.broadcast(tensor, src=mesh.group("tensor")[0], group=tensor_group())


class HeldOut:
    """The validation split of one run: batches for this rank, and what they stand for."""

    def __init__(
        self, config: Config, index: Index, mesh: Mesh, device: torch.device, split: str
    ) -> None:
        self.config, self.index, self.mesh, self.device = config, index, mesh, device
        self.split = split
        length = config.model.sequence_length
        tokens = index.split(split).tokens
        limit = config.training.validation_windows
        self.tokens = min(tokens, limit * length) if limit else tokens
        # Bytes of a part of the split, by its share of the tokens.
        self.bytes = split_bytes(index, split) * self.tokens / tokens if tokens else 0.0

    def batches(self) -> Iterator[tuple[Tensor, Tensor] | None]:
        """(ids, labels), each (micro_batch_size, L), as many on every rank.

        None on ranks that need no tokens.
        """
        length, rows = self.config.model.sequence_length, self.config.training.micro_batch_size
        if not (self.mesh.is_first_stage or self.mesh.is_last_stage):
            yield from [None] * -(-self.tokens // (length * rows * self.mesh.data))
            return
        windows = evaluation_windows(
            self.index,
            self.split,
            sequence_length=length,
            rows=rows,
            data_rank=self.mesh.data_rank,
            data_size=self.mesh.data,
            limit_windows=self.config.training.validation_windows,
        )
        for pair in windows:
            both = torch.from_numpy(np.stack(pair)).to(self.device)
            yield both[0], both[1]
