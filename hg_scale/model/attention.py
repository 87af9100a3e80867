"""Causal attention: inside a stack, full or in a sliding window, and between two levels.

Three implementations compute many positions at once, equal up to rounding:

- torch's fused kernel, for rotary positions; with an explicit mask for resampling, and for windows,
  which are computed in blocks to save time;
- `banded.py`, which replaces it inside stacks on a CPU;
- matrix products and softmax, for relative positions and for dropout on probabilities, which the
  fused kernels cannot reproduce from a given key.

Decoding has one query at a time, which may see every key in its cache.

`is_causal` is never used with unequal lengths: torch aligns that mask at the top left.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hg_scale.config.schema import ModelConfig
from hg_scale.model import banded
from hg_scale.model.cache import Cache, KVCache
from hg_scale.model.context import Context
from hg_scale.model.grouping import Alignment
from hg_scale.model.layers import PlainLayers
from hg_scale.model.plan import Level
from hg_scale.model.positions import relative_shift, rotate, sinusoids


class PositionBias(nn.Module):
    """Transformer-XL's two bias vectors u and v, (heads, d_head) each."""

    def __init__(self, layers: PlainLayers, heads: int, d_head: int) -> None:
        super().__init__()
        self.u = layers.by_head(heads, d_head, 0.0)
        self.v = layers.by_head(heads, d_head, 0.0)


class Attention(nn.Module):
    """Attention of one level to itself (`source` None) or to another level.

    Fused projections order their output features as (head, q k v, d_head), so that a
    tensor-parallel slice consists of complete heads.
    """

    def __init__(
        self,
        model: ModelConfig,
        layers: PlainLayers,
        query: Level,
        source: Level | None = None,
        positions: str | None = None,
        shared_bias: PositionBias | None = None,
    ) -> None:
        super().__init__()
        d = query.d_model
        self.heads, self.d_head = query.heads // layers.size, d // query.heads
        self.window = None if source else query.window
        self.crosses = source is not None
        self.upsamples = source is not None and source.index > query.index
        self.rotary = (positions or query.positions) == "rotary"
        self.rotary_base, self.d_model = model.rotary_base, d
        if source is None:
            self.qkv = layers.column(d, 3 * d, model.bias)
        else:
            self.q = layers.column(d, d, model.bias)
            self.kv = layers.column(source.d_model, 2 * d, model.bias)
        self.out = layers.row(d, d, model.bias)
        if not self.rotary:
            self.pos = layers.column(d, d, model.bias)
            if shared_bias is None:
                self.position_bias = PositionBias(layers, query.heads, self.d_head)
            # The model registers a shared pair once; the tuple keeps it from being registered here.
            self._bias = (shared_bias or self.position_bias,)
        self.eps = model.norm_eps
        self.q_scale = layers.by_head(query.heads, self.d_head, 1.0) if model.qk_norm else None
        self.k_scale = layers.by_head(query.heads, self.d_head, 1.0) if model.qk_norm else None
        self.dropout = layers.dropout(model.dropout, split_dim=1)

    def forward(
        self,
        x: Tensor,
        context: Context,
        tokens_per_position: int,
        source: Tensor | None = None,
        alignment: Alignment | None = None,
    ) -> Tensor:
        """Attend from x (B, n, d) to x, or to source (B, m, d_source); return (B, n, d).

        `tokens_per_position`: of the longer sequence.
        """
        align = alignment or Alignment(x.shape[1], x.shape[1])
        cache = context.cache
        start = cache.start if cache else 0
        q, k, v = self._project(x, source, tokens_per_position, align, start)
        # q: (B, heads, n, d_head); k, v: (B, heads, m, d_head)
        kv_cache = cache.get(self) if cache else None
        if cache is not None and kv_cache is not None:
            kv_cache.append(k, v)
            y = self._decode(q, kv_cache, cache.position // tokens_per_position % align.key_step)
        else:
            y = self._attend_all(q, k, v, context, tokens_per_position, align)
            if cache is not None:
                cache.store(self, self._build_kv_cache(k, v, cache, tokens_per_position, align))
        return self.out(y.transpose(1, 2).flatten(2))  # (B, n, heads * d_head)

    def _project(
        self,
        x: Tensor,
        source: Tensor | None,
        tokens_per_position: int,
        align: Alignment,
        start: int | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys, values (B, heads, n or m, d_head); token `start` comes first."""
        if source is None:
            q, k, v = self.qkv(x).unflatten(2, (self.heads, 3, self.d_head)).unbind(3)
        else:
            q = self.q(x).unflatten(2, (self.heads, self.d_head))
            k, v = self.kv(source).unflatten(2, (self.heads, 2, self.d_head)).unbind(3)
        q = self._norm_and_rotate(q, self.q_scale, tokens_per_position * align.query_step, start)
        k = self._norm_and_rotate(k, self.k_scale, tokens_per_position * align.key_step, start)
        return q, k, v.transpose(1, 2)

    def _norm_and_rotate(
        self, t: Tensor, scale: Tensor | None, step: int, start: int | Tensor
    ) -> Tensor:
        """Normalise and rotate queries or keys: (B, n, heads, d_head) -> (B, heads, n, d_head)."""
        if scale is not None:
            t = F.rms_norm(t, (self.d_head,), eps=self.eps) * scale
        t = t.transpose(1, 2)
        return rotate(t, step, self.rotary_base, start) if self.rotary else t

    def _attend_all(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: Context,
        tokens_per_position: int,
        align: Alignment,
    ) -> Tensor:
        """Attend from all positions at once: (B, heads, n, d_head)."""
        n = q.shape[2]
        explicit = not self.rotary or self.dropout.active(context)
        window = self.window if self.window and self.window < n else None
        if not self.crosses and not explicit and banded.is_preferred(q, window):
            return banded.attention(q, k, v, window)
        if window is not None:
            return self._attend_windowed(q, k, v, context, tokens_per_position, explicit)
        if explicit:
            return self._attend_explicit(q, k, v, context, tokens_per_position, align)
        if not self.crosses:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=align.visible(q.device))

    def _build_kv_cache(
        self, k: Tensor, v: Tensor, cache: Cache, tokens_per_position: int, align: Alignment
    ) -> KVCache:
        """Make a cache with the keys and values of the first pass."""
        groups = -(-cache.length // (tokens_per_position * align.query_step * align.key_step))
        positions = groups * align.query_step
        capacity = min(positions, self.window or positions)
        distances = None
        if not self.rotary:
            distances = self._embed_cached_distances(capacity, tokens_per_position, align, k)
            if capacity < positions:  # a ring buffer
                distances = torch.cat((distances, distances), 2)
        offsets = cache.position_offsets(tokens_per_position * align.key_step)
        return KVCache(k, v, capacity, offsets, distances)

    def _decode(self, q: Tensor, kv_cache: KVCache, group_offset: int) -> Tensor:
        """Attend from the newest query (B, heads, 1, d_head) to the cached keys."""
        k, v, mask = kv_cache.view()
        if not self.rotary:
            bias = self._bias[0]
            by_head = (q.squeeze(2) + bias.v).transpose(0, 1) / sqrt(self.d_head)
            scores = torch.bmm(by_head, kv_cache.distances_at(group_offset))  # (heads, B, keys)
            scores = scores.transpose(0, 1).unsqueeze(2)
            mask = scores if mask is None else scores + mask
            q = q + bias.u[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def _attend_explicit(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: Context,
        tokens_per_position: int,
        align: Alignment,
    ) -> Tensor:
        """Attend by matrix products and softmax, with relative positions or dropout."""
        if self.rotary:
            scores = q @ k.transpose(-1, -2)
        else:
            bias = self._bias[0]
            content = (q + bias.u[:, None]) @ k.transpose(-1, -2)
            by_distance = self._position_scores(q + bias.v[:, None], tokens_per_position, align)
            scores = content + by_distance
        return self._weigh_values(scores, align.visible(q.device), v, context)

    def _weigh_values(self, scores: Tensor, visible: Tensor, v: Tensor, context: Context) -> Tensor:
        """Apply scaling, mask, softmax and dropout to the scores, and weigh the values."""
        scores = (scores / sqrt(self.d_head)).masked_fill(~visible, float("-inf"))
        wide = torch.promote_types(scores.dtype, torch.float32)
        probabilities = scores.softmax(-1, dtype=wide).to(v.dtype)
        return self.dropout(probabilities, context) @ v

    def _embed_distances(self, first: int, count: int, step: int, like: Tensor) -> Tensor:
        """Return projected sinusoids of `count` distances: (heads, d_head, count)."""
        distances = sinusoids(first, count, step, self.d_model, like.device, like.dtype)
        table = self.pos(distances)
        return table.unflatten(1, (self.heads, self.d_head)).permute(1, 2, 0)

    def _embed_cached_distances(
        self, count: int, tokens_per_position: int, align: Alignment, like: Tensor
    ) -> Tensor:
        """Embed the distances of the newest query to the last `count` keys.

        Returns (key_step, heads, count, d_head): one table for each offset of the query inside
        its group.
        """
        step, stride = align.key_step, self._distance_stride(tokens_per_position)
        newest = (count - align.query_step) * step  # distance of the oldest key at offset 0
        return torch.stack([
            self._embed_distances(-(newest + offset) * stride, count, step * stride, like).mT
            for offset in range(step)
        ])  # fmt: skip

    def _distance_stride(self, tokens_per_position: int) -> int:
        """Return the relative distance of adjacent positions: in tokens, but 1 when upsampling.

        This follows the authors' code; it makes a difference in nested models only.
        """
        return 1 if self.upsamples else tokens_per_position

    def _position_scores(self, q: Tensor, tokens_per_position: int, align: Alignment) -> Tensor:
        """Return (B, heads, n, m): query i times the embedded distance key j - query i."""
        stride = self._distance_stride(tokens_per_position)
        if align.key_step > 1:  # upsampling: every key_step-th distance of the longer sequence
            n, k = align.queries, align.key_step
            by_distance = q @ self._embed_distances(-(n - 1) * stride, n, stride, q)
            return relative_shift(by_distance, 1)[..., ::k][..., : align.keys]
        k, n = align.query_step, align.queries
        first = -k * (n - 1) * stride
        return relative_shift(q @ self._embed_distances(first, align.keys, stride, q), k)

    def _attend_windowed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: Context,
        tokens_per_position: int,
        explicit: bool,
    ) -> Tensor:
        """Attend in blocks of one window of queries, each to its own and the previous block.

        Exact for a window of w: query i sees keys i - w + 1 .. i. The cost is 2 w keys per query.
        """
        w, n = self.window, q.shape[2]
        assert w is not None
        blocks = -(-n // w)
        pad = blocks * w - n
        q, k, v = (F.pad(t, (0, 0, 0, pad)) for t in (q, k, v))
        q = q.unflatten(2, (blocks, w)).transpose(1, 2)  # (B, blocks, heads, w, d_head)
        k, v = (self._with_previous(t, w) for t in (k, v))  # (B, blocks, heads, 2 w, d_head)
        row = torch.arange(w, device=q.device)[:, None]
        column = torch.arange(2 * w, device=q.device)
        visible = (column > row) & (column <= row + w)  # (w, 2 w)
        # The block before the first is padding. (blocks, 1, w, 2 w)
        first = torch.arange(blocks, device=q.device)[:, None, None, None] == 0
        visible = visible & ~(first & (column < w))
        if explicit:
            y = self._attend_windowed_explicit(q, k, v, visible, context, tokens_per_position)
        else:
            batch = q.shape[0]
            y = F.scaled_dot_product_attention(
                q.flatten(0, 1),
                k.flatten(0, 1),
                v.flatten(0, 1),
                attn_mask=visible.expand(batch, blocks, 1, w, 2 * w).flatten(0, 1),
            ).unflatten(0, (batch, blocks))
        return y.transpose(1, 2).flatten(2, 3)[:, :, :n]

    @staticmethod
    def _with_previous(t: Tensor, w: int) -> Tensor:
        """Prepend to each block the one before: (B, heads, n, d) -> (B, n / w, heads, 2 w, d)."""
        padded = F.pad(t, (0, 0, w, 0))
        return padded.unfold(2, 2 * w, w).permute(0, 2, 1, 4, 3)

    def _attend_windowed_explicit(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Tensor,
        context: Context,
        tokens_per_position: int,
    ) -> Tensor:
        """Attend inside blocks by matrix products and softmax."""
        w = q.shape[3]
        if self.rotary:
            scores = q @ k.transpose(-1, -2)
        else:
            bias, stride = self._bias[0], tokens_per_position
            content = (q + bias.u[:, None]) @ k.transpose(-1, -2)
            # Key column c of a block is c - w - row positions from the query in that row.
            embedded = self._embed_distances(-stride * (2 * w - 1), 2 * w, stride, q)
            scores = content + relative_shift((q + bias.v[:, None]) @ embedded, 1)
        # Dropout is sharded by heads at dimension 1: (B, heads, blocks, w, 2 w)
        scores, v = scores.transpose(1, 2), v.transpose(1, 2)
        return self._weigh_values(scores, visible.transpose(0, 1), v, context).transpose(1, 2)
