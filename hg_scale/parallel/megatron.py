"""Megatron's tensor-parallel modules behind the layers factory; only this file imports Megatron.

Only modules that run on a CPU and on GPUs are used: `parallel_state`, Column/RowParallelLinear,
VocabParallelEmbedding, `vocab_parallel_cross_entropy`, and the plain region mappings.
"""

from __future__ import annotations

import logging
import os
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hg_scale.config.constants import IGNORED_LABEL
from hg_scale.model.context import Dropout
from hg_scale.model.layers import PlainLayers
from hg_scale.model.sharding import TensorShard, mark_shard

# Without it Megatron warns at every layer. A run sets it before CUDA starts (`training/run.py`).
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

with warnings.catch_warnings():  # it warns of Transformer Engine and Apex, which are not used
    warnings.simplefilter("ignore")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    # From 0.19 on, its import makes torch look for a CUDA compiler and warn without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        copy_to_tensor_model_parallel_region,
        vocab_parallel_cross_entropy,
    )


def initialize_groups(tensor: int, pipeline: int) -> None:
    """Create Megatron's process groups: tensor ranks adjacent, pipeline outermost."""
    if parallel_state.model_parallel_is_initialized():
        destroy_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        create_gloo_process_groups=False,  # used only by Megatron's checkpoints
    )


def destroy_groups() -> None:
    """Destroy Megatron's process groups."""
    parallel_state.destroy_model_parallel()


def group_ranks() -> dict[str, list[int]]:
    """Return the global ranks of this rank's groups by axis."""
    return {
        "tensor": dist.get_process_group_ranks(parallel_state.get_tensor_model_parallel_group()),
        "pipeline": dist.get_process_group_ranks(
            parallel_state.get_pipeline_model_parallel_group()
        ),
        "data": dist.get_process_group_ranks(parallel_state.get_data_parallel_group()),
        "model": dist.get_process_group_ranks(parallel_state.get_model_parallel_group()),
    }


def tensor_group() -> dist.ProcessGroup:
    """Return this rank's tensor-parallel group."""
    return parallel_state.get_tensor_model_parallel_group()


class Mpu:
    """DeepSpeed's `mpu` interface without a pipeline: model-parallel means tensor-parallel."""

    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(
        parallel_state.get_tensor_model_parallel_world_size
    )
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


class _Column(ColumnParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class _Row(RowParallelLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class _Projection(_Row):
    """A row-parallel linear whose input is replicated on every rank.

    Each rank uses its slice of the input features; backward all-reduces the input's gradient.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = copy_to_tensor_model_parallel_region(x)
        rank, size = dist.get_rank(self.tp_group), dist.get_world_size(self.tp_group)
        return super().forward(x.chunk(size, -1)[rank].contiguous())


def _ignore(_: Tensor) -> None:
    """The initialiser Megatron requires; `model/initialization.py` fills all weights."""


class MegatronLayers(PlainLayers):
    """Layers factory whose layers are sharded over the current tensor-parallel group."""

    def __init__(self) -> None:
        self.rank = parallel_state.get_tensor_model_parallel_rank()
        self.size = parallel_state.get_tensor_model_parallel_world_size()
        self._config = ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            use_cpu_initialization=True,  # the engine moves the weights to the device
            perform_initialization=False,
            gradient_accumulation_fusion=False,  # needs Apex
            params_dtype=torch.float32,
        )

    def _shard(self, dim: int) -> TensorShard:
        return TensorShard(dim, self.rank, self.size)

    def column(self, d_in: int, d_out: int, bias: bool) -> nn.Module:
        layer = _Column(
            d_in, d_out, config=self._config, init_method=_ignore, bias=bias, gather_output=False
        )
        mark_shard(layer.weight, self._shard(0))
        if bias:
            mark_shard(layer.bias, self._shard(0))
        return layer

    def row(self, d_in: int, d_out: int, bias: bool) -> nn.Module:
        return self._row(_Row, d_in, d_out, bias)

    def projection(self, d_in: int, d_out: int, bias: bool) -> nn.Module:
        return self._row(_Projection, d_in, d_out, bias)

    def _row(self, kind: type[_Row], d_in: int, d_out: int, bias: bool) -> nn.Module:
        layer = kind(
            d_in,
            d_out,
            config=self._config,
            init_method=_ignore,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
        )
        mark_shard(layer.weight, self._shard(1))
        return layer

    def embedding(self, vocab: int, d: int) -> nn.Module:
        layer = VocabParallelEmbedding(vocab, d, init_method=_ignore, config=self._config)
        mark_shard(layer.weight, self._shard(0))
        return layer

    def by_head(self, heads: int, d_head: int, value: float) -> nn.Parameter:
        return mark_shard(super().by_head(heads // self.size, d_head, value), self._shard(0))

    def dropout(self, rate: float, split_dim: int | None = None) -> Dropout:
        return Dropout(rate, split_dim, self.rank, self.size)

    def vocab_start(self, vocab: int) -> int:
        return self.rank * (vocab // self.size)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        counted = labels != IGNORED_LABEL
        losses = vocab_parallel_cross_entropy(logits.float(), labels * counted)
        return losses * counted
