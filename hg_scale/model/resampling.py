"""The two layers that change the level: `Shorten` enters a level, `Upsample` leaves it.

Paper, sections 2.1 and 2.3; details that the paper leaves open (norms, the raw residual inside the
upsampling) follow the authors' code. `grouping.py` defines which positions form a group.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hg_scale.config.resampling_kind import ResamplingKind
from hg_scale.config.schema import ModelConfig
from hg_scale.model.attention import Attention, PositionBias
from hg_scale.model.block import Activations, FeedForward, Layer, make_norm
from hg_scale.model.cache import Cache, LastGroup, OpenGroup
from hg_scale.model.context import Context
from hg_scale.model.grouping import Alignment, FixedGroups
from hg_scale.model.layers import PlainLayers
from hg_scale.model.plan import Level, pooling_projection, upsampling_projection


def _resampling_dropout(model: ModelConfig, kind: ResamplingKind) -> float:
    """Return the dropout rate of the new positions: as in the authors' code, linear ones only.

    Positions that then attend have the dropouts of `ResamplingAttention` instead.
    """
    return model.dropout if kind.base == "linear" and not kind.attends else 0.0


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
        self,
        base: Tensor,
        source: Tensor,
        context: Context,
        tokens_per_position: int,
        alignment: Alignment,
    ) -> Tensor:
        """Attend from base (B, n, d_query) to source (B, m, d_source), both already normalised."""
        y = self.attention(base, context, tokens_per_position, source, alignment)
        base = base + self.dropout_attention(y, context)
        return base + self.dropout_ff(self.ff(self.ff_norm(base), context), context)


class Shorten(Layer):
    """Pool x (B, n, d_upper) to groups (B, ceil(n / k), d_lower), and keep x as a skip."""

    def __init__(
        self,
        model: ModelConfig,
        layers: PlainLayers,
        upper: Level,
        lower: Level,
        shared_bias: PositionBias | None,
    ) -> None:
        super().__init__()
        kind, k = model.pooling_kind, lower.factor // upper.factor
        self.level, self.width = upper.index, lower.d_model
        self.base, self.attends = kind.base, kind.attends
        projection = pooling_projection(kind, k, upper.d_model, lower.d_model)
        self.pool = layers.projection(*projection, model.bias) if projection else nn.Identity()
        self.dropout = layers.dropout(_resampling_dropout(model, kind))
        if self.attends:
            self.attend = ResamplingAttention(
                model, layers, lower, upper, upper.positions, shared_bias
            )

    def forward(self, state: Activations, context: Context) -> Activations:
        x = state.x
        k = context.factors[self.level]
        tokens_per_position = context.tokens_per_position(self.level)
        shifted = self._shift(x, k, tokens_per_position, context.cache)  # (B, groups * k, d_upper)
        groups = FixedGroups(k, shifted.shape[1])
        if not groups.count:  # a decoding step that completes no group
            z = x.new_empty(x.shape[0], 0, self.width)
        elif not self.attends:
            z = self.dropout(self._pool(groups.split(shifted)), context)
        else:
            source = self.attend.in_norm(shifted)
            base = self.attend.base_norm(self._pool(groups.split(source)))
            z = self.attend(base, source, context, tokens_per_position, groups.shortening)
        return Activations(z, (*state.skips, x))

    def _shift(self, x: Tensor, k: int, tokens_per_position: int, cache: Cache | None) -> Tensor:
        """Return the members of the groups that x (B, n, d) completes: (B, groups * k, d)."""
        open_group = cache.get(self) if cache else None
        if open_group is not None:
            return open_group.add(x)
        groups = FixedGroups(k, x.shape[1])
        if cache is not None:
            members = cache.last_positions(x, groups.open_members, tokens_per_position)
            cache.store(self, OpenGroup(members, k))
        return groups.shift(x)

    def _pool(self, groups: Tensor) -> Tensor:
        """Pool the members of each group: (B, groups, k, d_upper) -> (B, groups, d_lower)."""
        return self.pool(groups.flatten(2) if self.base == "linear" else groups.mean(2))


class Upsample(Layer):
    """Expand z (B, ceil(n / k), d_lower) to (B, n, d_upper), normalise it, and add the skip."""

    def __init__(
        self,
        model: ModelConfig,
        layers: PlainLayers,
        upper: Level,
        lower: Level,
        shared_bias: PositionBias | None,
    ) -> None:
        super().__init__()
        kind, k = model.upsampling_kind, lower.factor // upper.factor
        self.level = upper.index
        self.base, self.attends = kind.base, kind.attends
        projection = upsampling_projection(kind, k, upper.d_model, lower.d_model)
        self.expand = layers.projection(*projection, model.bias) if projection else nn.Identity()
        self.dropout = layers.dropout(_resampling_dropout(model, kind))
        if self.attends:
            self.attend = ResamplingAttention(
                model, layers, upper, lower, upper.positions, shared_bias
            )
        self.norm = make_norm(model, upper.d_model)
        learned = model.skip == "learned"
        self.gain = nn.Parameter(torch.ones(upper.d_model)) if learned else None

    def forward(self, state: Activations, context: Context) -> Activations:
        z, x = state.x, state.skips[-1]
        cache, tokens_per_position = context.cache, context.tokens_per_position(self.level)
        first = cache.position // tokens_per_position if cache else 0
        groups = FixedGroups(context.factors[self.level], x.shape[1], first)
        if not self.attends:
            y = self.dropout(self._expand(z, groups, tokens_per_position, cache), context)
        else:
            source = self.attend.in_norm(z)
            if self.base == "none":
                base = torch.zeros_like(x)
            else:
                base = self._expand(source, groups, tokens_per_position, cache)
            base = self.attend.base_norm(base) + x
            y = self.attend(base, source, context, tokens_per_position, groups.upsampling)
        skip = x if self.gain is None else x * self.gain
        return Activations(skip + self.norm(y), state.skips[:-1])

    def _expand(
        self, z: Tensor, groups: FixedGroups, tokens_per_position: int, cache: Cache | None
    ) -> Tensor:
        """Expand groups to positions: (B, groups, d_lower) -> (B, n, d_upper)."""
        z = self.expand(z)
        last_group = cache.get(self) if cache else None
        if last_group is not None:
            z = last_group.update(z)
        elif cache is not None:
            last = cache.last_positions(z, 1, tokens_per_position * groups.k)
            cache.store(self, LastGroup(last))
        return groups.unfold(z) if self.base == "linear" else groups.repeat(z)
