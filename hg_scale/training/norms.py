"""Norms of the fp32 weights, and of their change in one step, by level of the hierarchy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hg_scale.checkpoint.fragments import Slice
from hg_scale.config.schema import Config
from hg_scale.model.sharding import shard_of
from hg_scale.parallel.deepspeed_adapter import is_stage_copy, master_shard
from hg_scale.parallel.mesh import Mesh
from hg_scale.training.optimizer import level_of_parameter


class NormMeter:
    """Measures a step: `begin` before the optimizer's step, `finish` after it, on all ranks.

    Each weight counts once: on the ranks that hold its fp32 master, not in copies of it.
    """

    def __init__(
        self, config: Config, mesh: Mesh, engine: Any, slices: Mapping[nn.Parameter, Slice]
    ) -> None:
        self._mesh, self._engine, self._slices = mesh, engine, slices
        self._replicated = config.parallel.zero_stage == 0
        self._every, self._logged = config.logging.norms_every, config.logging.every
        self._level_count = config.model.parsed.level_count
        self._levels = {
            name: level_of_parameter(config.model, name)
            for name in (piece.name for piece in slices.values())
        }
        self._before: list[Tensor] = []

    def due(self, step: int) -> bool:
        """Whether to measure a step: a logged one, every `logging.norms_every` steps."""
        return self._every > 0 and step % self._every == 0 and step % self._logged == 0

    @torch.no_grad()
    def begin(self) -> None:
        """Copy this rank's share of the weights."""
        self._before = [weights.clone() for _, weights in self._shares()]

    @torch.no_grad()
    def finish(self, device: torch.device) -> dict[str, list[float]]:
        """Return the norms as they are logged. One collective."""
        squares = torch.zeros(2, self._level_count, dtype=torch.float64, device=device)
        for (level, weights), before in zip(self._shares(), self._before, strict=True):
            squares[0, level] += _square_norm(weights)
            squares[1, level] += _square_norm(weights - before)
        self._before = []
        if self._mesh.world_size > 1:
            dist.all_reduce(squares)
        weight_norms, update_norms = squares.sqrt().tolist()
        return {"weight_norm_by_level": weight_norms, "update_norm_by_level": update_norms}

    def _shares(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the level and the flat fp32 weights of each parameter that this rank counts."""
        if self._replicated and self._mesh.data_rank > 0:
            return
        for parameter, piece in self._slices.items():
            copy = shard_of(parameter).dim is None and self._mesh.tensor_rank > 0
            if copy or is_stage_copy(parameter):
                continue
            shard = master_shard(self._engine, parameter, piece.size)
            if shard is not None:
                flat = shard.tensor.detach().flatten()
                yield self._levels[piece.name], flat.narrow(0, shard.offset, shard.length)


def _square_norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.float64).square()
