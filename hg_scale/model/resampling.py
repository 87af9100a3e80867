"""The two layers that change the level: `Shorten` enters a level, `Upsample` leaves it.

Paper, sections 2.1 and 2.3; what the paper does not say (norms, the raw residual inside the
upsampling) follows the authors' code. Which positions form a group is `grouping.py`'s business.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hg_scale.config.schema import ModelConfig
from hg_scale.model.attention import Attention, PositionBias
from hg_scale.model.block import Activations, FeedForward, Layer, make_norm, total_factor
from hg_scale.model.cache import Cache, LastGroup, OpenGroup
from hg_scale.model.context import Context
from hg_scale.model.grouping import Alignment, FixedGroups
from hg_scale.model.layers import PlainLayers
from hg_scale.model.plan import Level


class ResamplingAttention(nn.Module):
    """Attention from one level to another, then a feed-forward, each with its residual."""

    def __init__(
        self,
        model: ModelConfig,
        layers: PlainLayers,
        query: Level,
        source: Level,
        positions: str,
        shared_bias: PositionBias | None,
    ) -> None:
        super().__init__()
        self.in_norm = make_norm(model, source.d_model)
        self.base_norm = make_norm(model, query.d_model)
        self.attention = Attention(model, layers, query, source, positions, shared_bias)
        self.ff_norm = make_norm(model, query.d_model)
        self.ff = FeedForward(model, layers, query)
        self.dropout_attention = layers.dropout(model.dropout)
        self.dropout_ff = layers.dropout(model.dropout)

    def forward(
        self, base: Tensor, source: Tensor, context: Context, unit: int, alignment: Alignment
    ) -> Tensor:
        """base (B, n, d_query), source (B, m, d_source), already normalised -> (B, n, d_query)."""
        y = self.attention(base, context, unit, source, alignment)
        base = base + self.dropout_attention(y, context)
        return base + self.dropout_ff(self.ff(self.ff_norm(base), context), context)


class Shorten(Layer):
    """x (B, n, d_upper) -> groups (B, ceil(n / k), d_lower), x kept as a skip."""

    def __init__(
        self,
        model: ModelConfig,
        layers: PlainLayers,
        upper: Level,
        lower: Level,
        shared_bias: PositionBias | None,
    ) -> None:
        super().__init__()
        self.level, self.width = upper.index, lower.d_model
        self.base = model.pooling.rpartition("+")[2]
        k = lower.factor // upper.factor
        if self.base == "linear":
            self.pool = layers.projection(k * upper.d_model, lower.d_model, model.bias)
        elif upper.d_model != lower.d_model:
            self.pool = layers.projection(upper.d_model, lower.d_model, model.bias)
        else:
            self.pool = nn.Identity()
        self.attends = model.pooling.startswith("attention")
        if self.attends:
            self.attend = ResamplingAttention(
                model, layers, lower, upper, upper.positions, shared_bias
            )

    def forward(self, state: Activations, context: Context) -> Activations:
        x = state.x
        k, unit = context.factors[self.level], total_factor(context, self.level)
        shifted = self._shift(x, k, unit, context.cache)  # (B, groups * k, d_upper)
        groups = FixedGroups(k, shifted.shape[1])
        if not groups.count:  # a step of decoding that makes no group whole
            z = x.new_empty(x.shape[0], 0, self.width)
        elif not self.attends:
            z = self._resize(groups.cut(shifted))
        else:
            source = self.attend.in_norm(shifted)
            base = self.attend.base_norm(self._resize(groups.cut(source)))
            z = self.attend(base, source, context, unit, groups.shortening)
        return Activations(z, (*state.skips, x))

    def _shift(self, x: Tensor, k: int, unit: int, cache: Cache | None) -> Tensor:
        """The members of the groups that x (B, n, d) makes whole: (B, groups * k, d)."""
        memory = cache.of(self) if cache else None
        if memory is not None:
            return memory.add(x)
        groups = FixedGroups(k, x.shape[1])
        if cache is not None:
            cache.keep(self, OpenGroup(cache.ends(x, groups.gathered, unit), k))
        return groups.shift(x)

    def _resize(self, cut: Tensor) -> Tensor:
        """(B, groups, k, d_upper) -> (B, groups, d_lower)."""
        return self.pool(cut.flatten(2) if self.base == "linear" else cut.mean(2))


class Upsample(Layer):
    """z (B, ceil(n / k), d_lower) -> (B, n, d_upper): expanded, normalised, added to the skip."""

    def __init__(
        self,
        model: ModelConfig,
        layers: PlainLayers,
        upper: Level,
        lower: Level,
        shared_bias: PositionBias | None,
    ) -> None:
        super().__init__()
        self.level = upper.index
        self.base = model.upsampling.rpartition("+")[2]
        k = lower.factor // upper.factor
        if self.base == "linear":
            self.expand = layers.projection(lower.d_model, k * upper.d_model, model.bias)
        elif self.base == "repeat" and upper.d_model != lower.d_model:
            self.expand = layers.projection(lower.d_model, upper.d_model, model.bias)
        else:
            self.expand = nn.Identity()
        self.attends = model.upsampling.startswith("attention")
        if self.attends:
            self.attend = ResamplingAttention(
                model, layers, upper, lower, upper.positions, shared_bias
            )
        self.norm = make_norm(model, upper.d_model)
        learned = model.skip == "learned"
        self.gain = nn.Parameter(torch.ones(upper.d_model)) if learned else None

    def forward(self, state: Activations, context: Context) -> Activations:
        z, x = state.x, state.skips[-1]
        k, unit = context.factors[self.level], total_factor(context, self.level)
        cache = context.cache
        first = cache.position // unit if cache else 0
        groups = FixedGroups(k, x.shape[1], first)
        if not self.attends:
            y = self._resize(z, groups, unit, cache)
        else:
            source = self.attend.in_norm(z)
            if self.base == "none":
                base = torch.zeros_like(x)
            else:
                base = self._resize(source, groups, unit, cache)
            base = self.attend.base_norm(base) + x
            y = self.attend(base, source, context, unit, groups.upsampling)
        skip = x if self.gain is None else x * self.gain
        return Activations(skip + self.norm(y), state.skips[:-1])

    def _resize(self, z: Tensor, groups: FixedGroups, unit: int, cache: Cache | None) -> Tensor:
        """(B, groups, d_lower) -> (B, n, d_upper)."""
        z = self.expand(z)
        memory = cache.of(self) if cache else None
        if memory is not None:
            z = memory.update(z)
        elif cache is not None:
            cache.keep(self, LastGroup(cache.ends(z, 1, unit * groups.k)))
        return groups.lay_out(z) if self.base == "linear" else groups.spread(z)
