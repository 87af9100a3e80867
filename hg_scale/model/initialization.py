"""Initial weights that do not depend on the layout.

Each parameter is drawn whole, on the CPU, from a generator seeded by (seed, its name), and then
cut to the slice that this rank holds. So the loss curve of a model is the same for every tensor,
pipeline, data and ZeRO size from the first step, up to rounding. The price: every rank draws each
tensor whole; a billion parameters take about ten seconds.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn

from hg_scale.config.schema import ModelConfig
from hg_scale.model.context import name_seed
from hg_scale.model.sharding import shard_of

PAPER_BIAS_STD = 1e-6


@torch.no_grad()
def initialize_weights(
    named: list[tuple[str, nn.Parameter]], model: ModelConfig, seed: int
) -> None:
    """Fill parameters, given under their canonical names, in place."""
    for name, parameter in named:
        shard = shard_of(parameter)
        whole = _draw(name, shard.whole_shape(tuple(parameter.shape)), model, seed)
        parameter.copy_(shard.take(whole))


def _draw(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    """One whole parameter in fp32.

    Norm scales and gains are 1; everything else follows `model.initialization`.
    """
    generator = torch.Generator().manual_seed(name_seed(seed, name))
    whole = torch.empty(shape)
    module, _, kind = name.rpartition(".")
    if kind in ("q_scale", "k_scale", "gain") or (len(shape) == 1 and kind == "weight"):
        return whole.fill_(1.0)
    if kind == "bias" and module.endswith("norm"):
        return whole.zero_()
    if model.initialization == "paper":
        return _paper(name, whole, generator)
    if kind in ("bias", "u", "v"):
        return whole.zero_()
    if name == "embedding.table.weight":
        # As large as what a norm gives: smaller, and the first block drowns which token it was.
        return whole.normal_(0.0, 1.0, generator=generator)
    std = 1 / sqrt(shape[-1])  # fan-in; 0.02 of GPT-2 at its widths, larger at narrow levels
    if name.endswith(("out.weight", "down.weight")):  # the last matrix of a residual branch
        std /= sqrt(2 * max(1, model.parsed.blocks))  # attention that resamples needs none
    return whole.normal_(0.0, std, generator=generator)


def _paper(name: str, whole: Tensor, generator: torch.Generator) -> Tensor:
    """The authors' code: Glorot-uniform matrices, N(0, 1e-6) biases, embedding by fan-out."""
    if whole.dim() == 1 or name.endswith((".u", ".v")):
        return whole.normal_(0.0, PAPER_BIAS_STD, generator=generator)
    rows, columns = whole.shape
    if name == "embedding.table.weight":
        bound = sqrt(3 / columns)
    elif name.endswith(("qkv.weight", "kv.weight")):
        # Fused: each part is a matrix of its own, with its own fan-out.
        rows //= 3 if name.endswith("qkv.weight") else 2
        bound = sqrt(6 / (rows + columns))
    else:
        bound = sqrt(6 / (rows + columns))
    return whole.uniform_(-bound, bound, generator=generator)
