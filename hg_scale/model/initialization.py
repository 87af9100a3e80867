"""Initial weights that do not depend on the layout.

Each parameter is drawn unsharded, on the CPU, from a generator seeded by (seed, its name), and then
cut to the slice that this rank holds. So the loss curve of a model is the same for every tensor,
pipeline, data and ZeRO size from the first step, up to rounding. The price: every rank draws every
parameter of its stage unsharded; a billion parameters take about ten seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt

import torch
from torch import Tensor, nn

from hg_scale.config.schema import ModelConfig
from hg_scale.model.context import name_seed
from hg_scale.model.sharding import shard_of

PAPER_BIAS_STD = 1e-6


@torch.no_grad()
def initialize_weights(
    named: Iterable[tuple[str, nn.Parameter]], model: ModelConfig, seed: int
) -> None:
    """Fill parameters in place. Those on the meta device have no data and are skipped.

    `named`: (name, parameter) with the parameter's name in the complete model.
    """
    for name, parameter in named:
        if not parameter.is_meta:
            shard = shard_of(parameter)
            shape = shard.unsharded_shape(tuple(parameter.shape))
            parameter.copy_(shard.slice_of(_draw(name, shape, model, seed)))


def _draw(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    """Return one unsharded parameter in fp32.

    Norm scales and gains are 1; the rest follows `model.initialization`.
    """
    generator = torch.Generator().manual_seed(name_seed(seed, name))
    weight = torch.empty(shape, dtype=torch.float32, device="cpu")
    module, _, kind = name.rpartition(".")
    if kind in ("q_scale", "k_scale", "gain") or (len(shape) == 1 and kind == "weight"):
        return weight.fill_(1.0)
    if kind == "bias" and module.endswith("norm"):
        return weight.zero_()
    if model.initialization == "paper":
        return _draw_as_paper(name, weight, generator)
    if kind in ("bias", "u", "v"):
        return weight.zero_()
    if name == "embedding.table.weight":
        # As large as the output of a norm: smaller, and the first block drowns the token's identity
        return weight.normal_(0.0, 1.0, generator=generator)
    std = 1 / sqrt(shape[-1])  # fan-in; 0.02 of GPT-2 at its widths, larger at narrow levels
    if name.endswith(("out.weight", "down.weight")):  # the last matrix of a residual branch
        std /= sqrt(2 * max(1, model.parsed.blocks))  # 0: only resampling attention has branches
    return weight.normal_(0.0, std, generator=generator)


def _draw_as_paper(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Draw as in the authors' code: Glorot-uniform matrices, biases of 1e-6."""
    if weight.dim() == 1 or name.endswith((".u", ".v")):
        return weight.normal_(0.0, PAPER_BIAS_STD, generator=generator)
    fan_out, fan_in = weight.shape
    if name == "embedding.table.weight":
        bound = sqrt(3 / fan_in)
    elif name.endswith(("qkv.weight", "kv.weight")):
        # Fused: each part is a matrix of its own, with its own fan-out.
        fan_out //= 3 if name.endswith("qkv.weight") else 2
        bound = sqrt(6 / (fan_out + fan_in))
    else:
        bound = sqrt(6 / (fan_out + fan_in))
    return weight.uniform_(-bound, bound, generator=generator)
