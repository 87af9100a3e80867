"""Causal attention: inside a stack, full or in a sliding window, and between two levels.

Three ways to compute it for many positions at once, alike up to rounding: torch's fused kernel
where the sides are equal and nothing else is asked for; it with an explicit mask for windows (cut
into blocks, so that a window saves time) and for resampling; plain matrix products for
relative scores and for dropout of probabilities, which the fused kernels cannot reproduce from a
given key. On a CPU `banded.py` takes the place of the fused kernel inside stacks. A step of
decoding has one query, which may see every key that its memory holds.

`is_causal` is never used with sides of different lengths: torch aligns that mask at the top left.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hg_scale.config.schema import ModelConfig
from hg_scale.model import banded
from hg_scale.model.cache import Cache, KeyValues
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
    """Queries of one level over keys and values of the same (`source` None) or another level.

    Fused projections keep each head's rows together, (head, q k v, d_head), so that a tensor
    slice is a run of whole heads.
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
            # A shared pair is registered once, by the model, and only referred to here.
            self._bias = (shared_bias or self.position_bias,)
        self.eps = model.norm_eps
        self.q_scale = layers.by_head(query.heads, self.d_head, 1.0) if model.qk_norm else None
        self.k_scale = layers.by_head(query.heads, self.d_head, 1.0) if model.qk_norm else None
        self.dropout = layers.dropout(model.dropout, split_dim=1)

    def forward(
        self,
        x: Tensor,
        context: Context,
        unit: int,
        source: Tensor | None = None,
        alignment: Alignment | None = None,
    ) -> Tensor:
        """x (B, n, d), source (B, m, d_source) -> (B, n, d).

        `unit` is the length of one position of the finer side in tokens (its total factor).
        """
        align = alignment or Alignment(x.shape[1], x.shape[1])
        cache = context.cache
        q, k, v = self._project(x, source, unit, align, cache.start if cache else 0)
        # q: (B, heads, n, d_head); k, v: (B, heads, m, d_head)
        memory = cache.of(self) if cache else None
        if cache is not None and memory is not None:
            memory.append(k, v)
            y = self._step(q, memory, cache.position // unit % align.key_step)
        else:
            y = self._parallel(q, k, v, context, unit, align)
            if cache is not None:
                cache.keep(self, self._remember(k, v, cache, unit, align))
        return self.out(y.transpose(1, 2).flatten(2))  # (B, n, heads * d_head)

    def _project(
        self, x: Tensor, source: Tensor | None, unit: int, align: Alignment, start: int | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values, (B, heads, n or m, d_head); positions begin at token `start`."""
        if source is None:
            q, k, v = self.qkv(x).unflatten(2, (self.heads, 3, self.d_head)).unbind(3)
        else:
            q = self.q(x).unflatten(2, (self.heads, self.d_head))
            k, v = self.kv(source).unflatten(2, (self.heads, 2, self.d_head)).unbind(3)
        q = self._place(q, self.q_scale, unit * align.query_step, start)
        k = self._place(k, self.k_scale, unit * align.key_step, start)
        return q, k, v.transpose(1, 2)

    def _place(self, t: Tensor, scale: Tensor | None, unit: int, start: int | Tensor) -> Tensor:
        """Queries or keys (B, n, heads, d_head) normalised, heads put first, turned."""
        if scale is not None:
            t = F.rms_norm(t, (self.d_head,), eps=self.eps) * scale
        t = t.transpose(1, 2)
        return rotate(t, unit, self.rotary_base, start) if self.rotary else t

    def _parallel(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context, unit: int, align: Alignment
    ) -> Tensor:
        """All positions at once, from the first on: (B, heads, n, d_head)."""
        n = q.shape[2]
        explicit = not self.rotary or self.dropout.active(context)
        window = self.window if self.window and self.window < n else None
        if not self.crosses and not explicit and banded.suits(q, window):
            return banded.attention(q, k, v, window)
        if window is not None:
            return self._windowed(q, k, v, context, unit, explicit)
        if explicit:
            return self._explicit(q, k, v, context, unit, align)
        if not self.crosses:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=align.visible(q.device))

    def _remember(
        self, k: Tensor, v: Tensor, cache: Cache, unit: int, align: Alignment
    ) -> KeyValues:
        """A memory with the keys and values of the first pass."""
        groups = -(-cache.length // (unit * align.query_step * align.key_step))
        room = groups * align.query_step
        capacity = min(room, self.window or room)
        distances = None
        if not self.rotary:
            distances = self._embed_memory(capacity, unit, align, k)
            if capacity < room:  # the keys will roll
                distances = torch.cat((distances, distances), 2)
        offsets = cache.offsets_at(unit * align.key_step)
        return KeyValues(k, v, capacity, offsets, distances)

    def _step(self, q: Tensor, memory: KeyValues, place: int) -> Tensor:
        """The newest query (B, heads, 1, d_head), at a place of its group, over what is held."""
        k, v, bias = memory.view()
        if not self.rotary:
            u, w = self._bias[0].u, self._bias[0].v
            by_head = (q.squeeze(2) + w).transpose(0, 1) / sqrt(self.d_head)  # (heads, B, d_head)
            scores = torch.bmm(by_head, memory.distances_at(place)).transpose(0, 1).unsqueeze(2)
            bias = scores if bias is None else scores + bias
            q = q + u[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def _explicit(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context, unit: int, align: Alignment
    ) -> Tensor:
        """Matrix products and softmax, with relative scores or dropout of probabilities."""
        if self.rotary:
            scores = q @ k.transpose(-1, -2)
        else:
            bias = self._bias[0]
            content = (q + bias.u[:, None]) @ k.transpose(-1, -2)
            scores = content + self._position_scores(q + bias.v[:, None], unit, align)
        return self._attend(scores, align.visible(q.device), v, context)

    def _attend(self, scores: Tensor, visible: Tensor, v: Tensor, context: Context) -> Tensor:
        scores = (scores / sqrt(self.d_head)).masked_fill(~visible, float("-inf"))
        wide = torch.promote_types(scores.dtype, torch.float32)
        probabilities = scores.softmax(-1, dtype=wide).to(v.dtype)
        return self.dropout(probabilities, context) @ v

    def _embed_distances(self, first: int, count: int, step: int, like: Tensor) -> Tensor:
        """Projected sinusoids of `count` distances: (heads, d_head, count)."""
        distances = sinusoids(first, count, step, self.d_model, like.device, like.dtype)
        table = self.pos(distances)
        return table.unflatten(1, (self.heads, self.d_head)).permute(1, 2, 0)

    def _embed_memory(self, count: int, unit: int, align: Alignment, like: Tensor) -> Tensor:
        """Embedded distances of the newest query, at each place, to the last `count` keys.

        (places, heads, count, d_head), places being the keys' step.
        """
        step, unit = align.key_step, self._distance_unit(unit)
        newest = (count - align.query_step) * step  # the first place of the newest query
        return torch.stack([
            self._embed_distances(-(newest + place) * unit, count, step * unit, like).mT
            for place in range(step)
        ])  # fmt: skip

    def _distance_unit(self, unit: int) -> int:
        """What relative distances are counted in: tokens, but positions when upsampling.

        So it is in the authors' code (it differs in nested models only).
        """
        return 1 if self.upsamples else unit

    def _position_scores(self, q: Tensor, unit: int, align: Alignment) -> Tensor:
        """(B, heads, n, m): query i on the embedding of its signed distance to key j.

        The distance is key minus query.
        """
        unit = self._distance_unit(unit)
        if align.key_step > 1:  # upsampling: every key_step-th distance of the finer sequence
            n, k = align.queries, align.key_step
            by_distance = q @ self._embed_distances(-(n - 1) * unit, n, unit, q)
            return relative_shift(by_distance, 1)[..., ::k][..., : align.keys]
        k, n = align.query_step, align.queries
        first = -k * (n - 1) * unit
        return relative_shift(q @ self._embed_distances(first, align.keys, unit, q), k)

    def _windowed(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context, unit: int, explicit: bool
    ) -> Tensor:
        """Blocks of one window of queries, each over its own and the previous block of keys.

        Exact for a window of w: query i sees keys i - w + 1 .. i. Cost 2 w keys a query.
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
            y = self._windowed_scores(q, k, v, visible, context, unit)
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
        """(B, heads, blocks * w, d_head) -> (B, blocks, heads, 2 w, d_head)."""
        padded = F.pad(t, (0, 0, w, 0))
        return padded.unfold(2, 2 * w, w).permute(0, 2, 1, 4, 3)

    def _windowed_scores(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, context: Context, unit: int
    ) -> Tensor:
        w = q.shape[3]
        if self.rotary:
            scores = q @ k.transpose(-1, -2)
        else:
            bias = self._bias[0]
            content = (q + bias.u[:, None]) @ k.transpose(-1, -2)
            # Key column c of a block is c - w - row positions from the query in that row.
            embedded = self._embed_distances(-unit * (2 * w - 1), 2 * w, unit, q)
            scores = content + relative_shift((q + bias.v[:, None]) @ embedded, 1)
        # Dropout splits heads at dimension 1: (B, heads, blocks, w, 2 w)
        scores, v = scores.transpose(1, 2), v.transpose(1, 2)
        return self._attend(scores, visible.transpose(0, 1), v, context).transpose(1, 2)
