"""Parameters, floating-point operations and cache of every layer, in closed form, without torch.

Conventions: 2 FLOPs a multiply-add, matrix products only; forward pass; attention without causal
skipping (a query of full attention counts all keys, as in PaLM's appendix B), a sliding window
counts its width. Training costs three times the forward pass; recomputation is not counted.
Upsampling attention with relative positions counts the scores it keeps: the code computes k times
as many and drops the rest, 0.6 to 2.1% of the paper's models. Per-level counts matter here:
6 x parameters x tokens would overstate an Hourglass several times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from hg_scale.config.hierarchy import level_lengths
from hg_scale.config.schema import ModelConfig
from hg_scale.model.plan import LayerPlan, Level, layer_plan, model_levels

TRAINING_FACTOR = 3  # forward, and twice that backward


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer on one sequence: `parameters`, forward `flops`."""

    layer: LayerPlan
    parameters: int
    flops: int


def layer_costs(
    model: ModelConfig, length: int | None = None, factors: tuple[int, ...] | None = None
) -> list[LayerCost]:
    """Costs of all layers in order, for one sequence of `length` tokens (default: the model's).

    `factors`: step factor of each level, where they are not the hierarchy's. The biases of
    `shared_position_bias` belong to no layer: see `parameter_count`.
    """
    counter = _Counter(model, length or model.sequence_length, factors or model.parsed.factors)
    return [LayerCost(layer, *counter.layer(layer)) for layer in layer_plan(model)]


def parameter_count(model: ModelConfig) -> int:
    """All parameters of the model, padding of the vocabulary included."""
    total = sum(cost.parameters for cost in layer_costs(model))
    return total + (2 * shared_bias_width(model) if model.shared_position_bias else 0)


def shared_bias_width(model: ModelConfig) -> int:
    """Width of the levels with relative positions, which share one pair of biases."""
    return next(s.d_model for s in model_levels(model) if s.positions == "relative")


def forward_flops(model: ModelConfig, length: int | None = None) -> int:
    """Forward FLOPs of one sequence."""
    return sum(cost.flops for cost in layer_costs(model, length))


def training_flops_per_token(model: ModelConfig) -> float:
    """Training FLOPs for each token of a training window: with shorten-factor dropout, the mean."""
    draws = list(product(*model.factor_choices)) if model.factor_choices else [None]
    whole = sum(cost.flops for draw in draws for cost in layer_costs(model, None, draw))
    return TRAINING_FACTOR * whole / len(draws) / model.sequence_length


def cache_bytes(model: ModelConfig, length: int, rows: int = 1, element: int = 4) -> int:
    """Bytes that decoding keeps for `rows` texts of up to `length` tokens.

    `element`: bytes of a number. Rows that do not begin together add a number for each of their
    keys, (2 d_model) times less than the keys and values.
    """
    counts = cached_numbers(model, length).values()
    return element * sum(rows * by_row + shared for by_row, shared in counts)


def cached_numbers(model: ModelConfig, length: int) -> dict[str, tuple[int, int]]:
    """What each layer, by name, keeps for `cache_bytes`: numbers a row, numbers for all rows."""
    counter = _CacheCounter(model, length)
    return {layer.name: counter.layer(layer) for layer in layer_plan(model)}


class _CacheCounter:
    """Counts (numbers a row, numbers for all rows) that each layer keeps, for one model and length.

    What all rows share are the embedded distances of relative positions.
    """

    def __init__(self, model: ModelConfig, length: int) -> None:
        self.model, self.levels = model, model_levels(model)
        self.lengths = level_lengths(length, model.parsed.factors)

    def layer(self, layer: LayerPlan) -> tuple[int, int]:
        level, n = self.levels[layer.level], self.lengths[layer.level]
        if layer.kind == "block":
            held = min(level.window or n, n)
            turns = 2 if held < n else 1
            return self.attention(level, held, turns * held, level.positions)
        if layer.kind not in ("shorten", "upsample"):
            return 0, 0
        k, lower = self.model.parsed.shortenings[layer.level].k, self.levels[layer.level + 1]
        groups = self.lengths[layer.level + 1]
        if layer.kind == "shorten":  # the open group, and the keys of all members
            kept, asks, keys = k * level.d_model, lower, groups * k
            attends = self.model.pooling.startswith("attention")
        else:  # what the newest group gives, and the keys of all groups
            base = self.model.upsampling.rpartition("+")[2]
            kept = {"linear": k, "repeat": 1, "none": 0}[base] * level.d_model
            asks, keys = level, groups
            attends = self.model.upsampling.startswith("attention")
        if not attends:
            return kept, 0
        by_row, shared = self.attention(asks, keys, groups * k, level.positions)
        return kept + by_row, shared

    def attention(self, asks: Level, keys: int, distances: int, positions: str) -> tuple[int, int]:
        return 2 * keys * asks.d_model, distances * asks.d_model * (positions == "relative")


class _Counter:
    """Counts (parameters, flops) layer by layer for one model and length."""

    def __init__(self, model: ModelConfig, length: int, factors: tuple[int, ...]) -> None:
        self.model, self.factors = model, factors
        self.levels = model_levels(model)
        self.lengths = level_lengths(length, factors)
        self.norm_width = 2 if model.norm == "layernorm" else 1  # vectors of a norm

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
        """Attention of n queries over m keys; `positions` of the longer side."""
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
        n = self.lengths[j + 1]
        base = self.model.pooling.rpartition("+")[2]
        if base == "linear":
            yield self.linear(n, k * upper.d_model, lower.d_model)
        elif upper.d_model != lower.d_model:
            yield self.linear(n, upper.d_model, lower.d_model)
        if "attention" in self.model.pooling:
            yield from self.resampling_attention(lower, n, upper, n * k, upper.positions)

    def upsample(self, j: int) -> Iterator[tuple[int, int]]:
        k = self.factors[j]
        upper, lower = self.levels[j], self.levels[j + 1]
        n, m = self.lengths[j], self.lengths[j + 1]
        yield self.norm(upper.d_model), 0
        if self.model.skip == "learned":
            yield upper.d_model, 0
        base = self.model.upsampling.rpartition("+")[2]
        if base == "linear":
            yield self.linear(m, lower.d_model, k * upper.d_model)
        elif base == "repeat" and upper.d_model != lower.d_model:
            yield self.linear(m, lower.d_model, upper.d_model)
        if "attention" in self.model.upsampling:
            yield from self.resampling_attention(upper, n, lower, m, upper.positions)
