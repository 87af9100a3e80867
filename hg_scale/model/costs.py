"""Parameters, FLOPs and cache size of every layer, in closed form. Imports no torch.

Conventions: forward pass, matrix products only, 2 FLOPs per multiply-add. Attention does not skip
masked keys (a query of full attention counts all keys, as in PaLM's appendix B); a sliding window
counts its width. Training costs three times the forward pass; recomputation is not counted.
Upsampling attention with relative positions counts the scores it uses: the code computes k times
as many and drops the rest, 0.6 to 2.1% of the FLOPs of the paper's models. The usual 6 x parameters
x tokens would overestimate an Hourglass several times, since its inner levels are shorter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from hg_scale.config.hierarchy import level_lengths
from hg_scale.config.schema import ModelConfig
from hg_scale.model.plan import (
    LayerPlan,
    Level,
    layer_plan,
    model_levels,
    pooling_projection,
    upsampling_projection,
)

TRAINING_FACTOR = 3  # the backward pass costs twice the forward pass


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer: `parameters`, and forward `flops` of one sequence."""

    layer: LayerPlan
    parameters: int
    flops: int


def layer_costs(
    model: ModelConfig, length: int | None = None, factors: tuple[int, ...] | None = None
) -> list[LayerCost]:
    """Return the costs of all layers in order, for one sequence of `length` tokens.

    Default: the model's sequence length. `factors`: step factors that replace the hierarchy's.
    The biases of `shared_position_bias` belong to no layer: see `parameter_count`.
    """
    counter = _CostCounter(model, length or model.sequence_length, factors or model.parsed.factors)
    return [LayerCost(layer, *counter.layer(layer)) for layer in layer_plan(model)]


def parameter_count(model: ModelConfig) -> int:
    """Return the number of parameters, including the padding of the vocabulary."""
    total = sum(cost.parameters for cost in layer_costs(model))
    return total + (2 * shared_bias_width(model) if model.shared_position_bias else 0)


def shared_bias_width(model: ModelConfig) -> int:
    """Return the width of the levels that share one pair of position biases."""
    return next(s.d_model for s in model_levels(model) if s.positions == "relative")


def forward_flops(model: ModelConfig, length: int | None = None) -> int:
    """Return the forward FLOPs of one sequence."""
    return sum(cost.flops for cost in layer_costs(model, length))


def training_flops_per_token(model: ModelConfig) -> float:
    """Return the training FLOPs per token; with shorten-factor dropout, the mean over its draws."""
    draws = list(product(*model.factor_choices)) if model.factor_choices else [None]
    total = sum(cost.flops for draw in draws for cost in layer_costs(model, None, draw))
    return TRAINING_FACTOR * total / len(draws) / model.sequence_length


def cache_bytes(
    model: ModelConfig, length: int, batch_size: int = 1, element_bytes: int = 4
) -> int:
    """Return the bytes that decoding caches for `batch_size` sequences of up to `length` tokens.

    Sequences that start at different positions add one element for each of their keys, (2 d_model)
    times less than the keys and values.
    """
    counts = cache_elements(model, length).values()
    return element_bytes * sum(batch_size * each + shared for each, shared in counts)


def cache_elements(model: ModelConfig, length: int) -> dict[str, tuple[int, int]]:
    """Return what each layer caches, by name: (elements per sequence, elements shared by all)."""
    counter = _CacheCounter(model, length)
    return {layer.name: counter.layer(layer) for layer in layer_plan(model)}


class _CacheCounter:
    """Counts the cached elements (per sequence, shared by all) of each layer.

    Sequences share the embedded distances of relative positions.
    """

    def __init__(self, model: ModelConfig, length: int) -> None:
        self.model, self.levels = model, model_levels(model)
        self.lengths = level_lengths(length, model.parsed.factors)

    def layer(self, layer: LayerPlan) -> tuple[int, int]:
        level, n = self.levels[layer.level], self.lengths[layer.level]
        if layer.kind == "block":
            keys = min(level.window or n, n)
            tables = 2 if keys < n else 1  # a ring buffer has its distances twice
            return self.attention(level, keys, tables * keys, level.positions)
        if layer.kind not in ("shorten", "upsample"):
            return 0, 0
        k, lower = self.model.parsed.shortenings[layer.level].k, self.levels[layer.level + 1]
        groups = self.lengths[layer.level + 1]
        if layer.kind == "shorten":  # the open group, and the keys of all members
            kind, query, keys = self.model.pooling_kind, lower, groups * k
            elements = k * level.d_model
        else:  # the newest group, upsampled, and the keys of all groups
            kind, query, keys = self.model.upsampling_kind, level, groups
            projection = upsampling_projection(kind, k, level.d_model, lower.d_model)
            elements = projection[1] if projection else level.d_model
            elements *= kind.base != "none"
        if not kind.attends:
            return elements, 0
        each, shared = self.attention(query, keys, groups * k, level.positions)
        return elements + each, shared

    def attention(self, query: Level, keys: int, distances: int, positions: str) -> tuple[int, int]:
        return 2 * keys * query.d_model, distances * query.d_model * (positions == "relative")


class _CostCounter:
    """Counts (parameters, FLOPs) of each layer, for one model and length."""

    def __init__(self, model: ModelConfig, length: int, factors: tuple[int, ...]) -> None:
        self.model, self.factors = model, factors
        self.levels = model_levels(model)
        self.lengths = level_lengths(length, factors)
        self.norm_width = 2 if model.norm == "layernorm" else 1  # parameter vectors of a norm

    def layer(self, layer: LayerPlan) -> tuple[int, int]:
        level = self.levels[layer.level]
        n = self.lengths[layer.level]
        vocab, d = self.model.padded_vocab, level.d_model
        match layer.kind:
            case "embedding":
                return vocab * d, 0
            case "head":
                return self.linear(n, d, vocab)
            case "norm":
                return self.norm(d), 0
            case "block":
                parts = [
                    (2 * self.norm(d), 0),
                    self.attention(level, n, level, n),
                    self.feed_forward(level, n),
                ]
            case "shorten":
                parts = list(self.shorten(layer.level))
            case "upsample":
                parts = list(self.upsample(layer.level))
        return sum(p for p, _ in parts), sum(f for _, f in parts)

    def linear(self, n: int, d_in: int, d_out: int) -> tuple[int, int]:
        return d_in * d_out + (d_out if self.model.bias else 0), 2 * n * d_in * d_out

    def norm(self, d: int) -> int:
        return self.norm_width * d

    def feed_forward(self, level: Level, n: int) -> tuple[int, int]:
        gates = 2 if self.model.activation == "swiglu" else 1
        up = self.linear(n, level.d_model, gates * level.d_ff)
        down = self.linear(n, level.d_ff, level.d_model)
        return up[0] + down[0], up[1] + down[1]

    def attention(
        self,
        query: Level,
        n: int,
        key: Level,
        m: int,
        positions: str | None = None,
        windowed: bool = True,
    ) -> tuple[int, int]:
        """Count attention of n queries to m keys; `positions`: of the longer sequence."""
        positions = positions or query.positions
        d = query.d_model
        window = query.window if windowed else None
        seen = min(window or m, m)
        parts = [
            self.linear(n, d, d),
            self.linear(m, key.d_model, 2 * d),
            self.linear(n, d, d),
            (0, 2 * 2 * n * seen * d),  # scores and values
        ]
        if positions == "relative":
            distances = seen if seen < m else max(n, m)
            parts.append(self.linear(distances, d, d))
            parts.append((0, 2 * n * seen * d))
            if not self.model.shared_position_bias:
                parts.append((2 * d, 0))
        if self.model.qk_norm:
            parts.append((2 * d, 0))
        return sum(p for p, _ in parts), sum(f for _, f in parts)

    def resampling_attention(
        self, query: Level, n: int, key: Level, m: int, positions: str
    ) -> Iterator[tuple[int, int]]:
        yield self.norm(key.d_model) + 2 * self.norm(query.d_model), 0
        yield self.attention(query, n, key, m, positions, windowed=False)
        yield self.feed_forward(query, n)

    def shorten(self, j: int) -> Iterator[tuple[int, int]]:
        k = self.factors[j]
        upper, lower = self.levels[j], self.levels[j + 1]
        n, kind = self.lengths[j + 1], self.model.pooling_kind
        projection = pooling_projection(kind, k, upper.d_model, lower.d_model)
        if projection:
            yield self.linear(n, *projection)
        if kind.attends:
            yield from self.resampling_attention(lower, n, upper, n * k, upper.positions)

    def upsample(self, j: int) -> Iterator[tuple[int, int]]:
        k = self.factors[j]
        upper, lower = self.levels[j], self.levels[j + 1]
        n, m, kind = self.lengths[j], self.lengths[j + 1], self.model.upsampling_kind
        yield self.norm(upper.d_model), 0
        if self.model.skip == "learned":
            yield upper.d_model, 0
        projection = upsampling_projection(kind, k, upper.d_model, lower.d_model)
        if projection:
            yield self.linear(m, *projection)
        if kind.attends:
            yield from self.resampling_attention(upper, n, lower, m, upper.positions)
