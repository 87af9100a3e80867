"""The layers that stay at one level: embedding, Transformer block, norm, head."""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hg_scale.config.constants import SWIGLU_CHUNKS
from hg_scale.config.schema import ModelConfig
from hg_scale.model.attention import Attention, PositionBias
from hg_scale.model.context import Context
from hg_scale.model.layers import PlainLayers
from hg_scale.model.plan import Level


class Activations(NamedTuple):
    """The input and output of every layer.

    `x`: token ids (B, L) before the embedding, activations (B, n, d), logits after the head.
    `skips`: the inputs of the shortenings that are not upsampled yet, outermost first.
    """

    x: Tensor
    skips: tuple[Tensor, ...] = ()


class Layer(nn.Module):
    """One entry of the layer list: `forward(state, context) -> state`."""

    def forward(self, state: Activations, context: Context) -> Activations:
        raise NotImplementedError


def make_norm(model: ModelConfig, d: int) -> nn.Module:
    """Make the LayerNorm or RMSNorm over d features."""
    kind = nn.LayerNorm if model.norm == "layernorm" else nn.RMSNorm
    return kind(d, eps=model.norm_eps)


class Embedding(Layer):
    """Token ids (B, L) -> (B, L, d)."""

    def __init__(self, model: ModelConfig, layers: PlainLayers, level: Level) -> None:
        super().__init__()
        self.table = layers.embedding(model.padded_vocab, level.d_model)
        self.dropout = layers.dropout(model.dropout)

    def forward(self, state: Activations, context: Context) -> Activations:
        return Activations(self.dropout(self.table(state.x), context))


class FeedForward(nn.Module):
    """Feed-forward d -> d_ff -> d with GELU (tanh form) or gated SiLU.

    Gate and up projections alternate in chunks of output features, (chunk, gate up, features), so
    that a tensor-parallel slice contains complete pairs.
    """

    def __init__(self, model: ModelConfig, layers: PlainLayers, level: Level) -> None:
        super().__init__()
        self.gated = model.activation == "swiglu"
        self.chunks = gcd(level.d_ff, SWIGLU_CHUNKS) // layers.size
        self.up = layers.column(level.d_model, level.d_ff * (1 + self.gated), model.bias)
        self.down = layers.row(level.d_ff, level.d_model, model.bias)
        self.dropout = layers.dropout(model.dropout, split_dim=-1)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        h = self.up(x)
        if self.gated:
            gate, up = h.unflatten(2, (self.chunks, 2, -1)).unbind(3)
            h = (F.silu(gate) * up).flatten(2)
        else:
            h = F.gelu(h, approximate="tanh")
        return self.down(self.dropout(h, context))


class TransformerBlock(Layer):
    """A pre-norm Transformer block: attention, then feed-forward, each with its residual."""

    def __init__(
        self,
        model: ModelConfig,
        layers: PlainLayers,
        level: Level,
        shared_bias: PositionBias | None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.level, self.recompute = level.index, recompute
        self.attention_norm = make_norm(model, level.d_model)
        self.attention = Attention(model, layers, level, shared_bias=shared_bias)
        self.ff_norm = make_norm(model, level.d_model)
        self.ff = FeedForward(model, layers, level)
        self.dropout_attention = layers.dropout(model.dropout)
        self.dropout_ff = layers.dropout(model.dropout)

    def forward(self, state: Activations, context: Context) -> Activations:
        if self.recompute and torch.is_grad_enabled():
            x = checkpoint(self._block, state.x, context, use_reentrant=False)
        else:
            x = self._block(state.x, context)
        return state._replace(x=x)

    def _block(self, x: Tensor, context: Context) -> Tensor:
        tokens_per_position = context.tokens_per_position(self.level)
        y = self.attention(self.attention_norm(x), context, tokens_per_position)
        x = x + self.dropout_attention(y, context)
        return x + self.dropout_ff(self.ff(self.ff_norm(x), context), context)


class Norm(Layer):
    """The norm at the end of a stack (from the authors' code; the paper does not mention it)."""

    def __init__(self, model: ModelConfig, level: Level) -> None:
        super().__init__()
        self.norm = make_norm(model, level.d_model)

    def forward(self, state: Activations, context: Context) -> Activations:
        return state._replace(x=self.norm(state.x))


class Head(Layer):
    """(B, L, d) -> logits (B, L, padded vocabulary / tensor ranks); padded logits are masked."""

    def __init__(self, model: ModelConfig, layers: PlainLayers, level: Level) -> None:
        super().__init__()
        self.linear = layers.column(level.d_model, model.padded_vocab, model.bias)
        start = layers.vocab_start(model.padded_vocab)
        self.vocab = max(0, model.vocab_size - start)  # logits of this rank that are not padding

    def forward(self, state: Activations, context: Context) -> Activations:
        logits = self.linear(state.x)
        if self.vocab < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= self.vocab
            logits = logits.masked_fill(padding, torch.finfo(logits.dtype).min)
        return Activations(logits)
