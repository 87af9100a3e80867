"""Parameters, FLOPs and cache size of every layer, in closed form. Imports no torch.

Matrix products only, 2 FLOPs per multiply-add. The usual 6 x parameters x tokens would overestimate
an Hourglass several times, since its inner levels are shorter. Three counts differ in the products
of attention:

model FLOPs     every query counts all keys, as in the paper and in PaLM's appendix B, or those of
                its sliding window. Training costs three times the forward pass.
causal FLOPs    every query counts the keys that it sees: what a causal kernel needs. Likewise.
executed FLOPs  what `attention.py` computes on a device, masked scores included, and what autograd
                computes in the backward pass; with recomputation, blocks a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product

from hg_scale.config.hierarchy import level_lengths
from hg_scale.config.schema import ModelConfig
from hg_scale.model.attention_pairs import Kernels, Pairing, executed_pairs
from hg_scale.model.plan import (
    LayerPlan,
    Level,
    layer_plan,
    model_levels,
    pooling_projection,
    upsampling_projection,
)

TRAINING_FACTOR = 3  # the backward pass costs twice the forward pass


_FUSED_BACKWARD = 5, 2  # products: scores again, and four for the gradients; of the forward pass


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer: `parameters`, and the FLOPs of one sequence in its forward pass.

    flops: model FLOPs. backward: executed FLOPs of the backward pass. recomputed: those that the
    recomputation of a block adds to it.
    """

    layer: LayerPlan
    parameters: int
    flops: int
    causal: int
    executed: int
    backward: int
    recomputed: int


def layer_costs(
    model: ModelConfig,
    length: int | None = None,
    factors: tuple[int, ...] | None = None,
    kernels: Kernels = Kernels(),  # noqa: B008 - it is immutable
) -> list[LayerCost]:
    """Return the costs of all layers in order, for one sequence of `length` tokens.

    Default: the model's sequence length. `factors`: step factors that replace the hierarchy's.
    The biases of `shared_position_bias` belong to no layer: see `parameter_count`.
    """
    length, factors = length or model.sequence_length, factors or model.parsed.factors
    counter = _CostCounter(model, length, factors, kernels)
    costs = [(layer, counter.layer(layer)) for layer in layer_plan(model)]
    return [LayerCost(layer, *(getattr(c, f.name) for f in fields(c))) for layer, c in costs]


def parameter_count(model: ModelConfig) -> int:
    """Return the number of parameters, including the padding of the vocabulary."""
    total = sum(cost.parameters for cost in layer_costs(model))
    return total + (2 * shared_bias_width(model) if model.shared_position_bias else 0)


def shared_bias_width(model: ModelConfig) -> int:
    """Return the width of the levels that share one pair of position biases."""
    return next(s.d_model for s in model_levels(model) if s.positions == "relative")


def forward_flops(model: ModelConfig, length: int | None = None) -> int:
    """Return the model FLOPs of the forward pass of one sequence."""
    return sum(cost.flops for cost in layer_costs(model, length))


def training_flops_per_token(model: ModelConfig) -> float:
    """Return the model FLOPs per token in training.

    With shorten-factor dropout, the mean over its draws; so for the other two counts.
    """
    return _mean_per_token(model, lambda cost: TRAINING_FACTOR * cost.flops)


def causal_flops_per_token(model: ModelConfig) -> float:
    """Return the causal FLOPs per token in training."""
    return _mean_per_token(model, lambda cost: TRAINING_FACTOR * cost.causal)


def executed_flops_per_token(
    model: ModelConfig,
    recompute: Sequence[bool] = (),
    kernels: Kernels = Kernels(),  # noqa: B008 - it is immutable
) -> float:
    """Return the executed FLOPs per token in training.

    recompute: by level, whether its blocks run forward again in the backward pass.
    """

    def executed(cost: LayerCost) -> int:
        again = cost.layer.kind == "block" and any(recompute[cost.layer.level :][:1])
        return cost.executed + cost.backward + again * cost.recomputed

    return _mean_per_token(model, executed, kernels)


def _mean_per_token(
    model: ModelConfig,
    count: Callable[[LayerCost], int],
    kernels: Kernels = Kernels(),  # noqa: B008 - it is immutable
) -> float:
    draws = list(product(*model.factor_choices)) if model.factor_choices else [None]
    total = sum(count(cost) for draw in draws for cost in layer_costs(model, None, draw, kernels))
    return total / len(draws) / model.sequence_length


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


@dataclass(frozen=True)
class _Cost:
    """The numbers of `LayerCost`, of a part of a layer."""

    parameters: int = 0
    flops: int = 0
    causal: int = 0
    executed: int = 0
    backward: int = 0
    recomputed: int = 0

    def __add__(self, other: _Cost) -> _Cost:
        return _Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class _CostCounter:
    """Counts the cost of each layer, for one model and length."""

    def __init__(
        self, model: ModelConfig, length: int, factors: tuple[int, ...], kernels: Kernels
    ) -> None:
        self.model, self.factors = model, factors
        self.levels = model_levels(model)
        self.lengths = level_lengths(length, factors)
        self.norm_width = 2 if model.norm == "layernorm" else 1  # parameter vectors of a norm
        self.kernels = kernels

    def layer(self, layer: LayerPlan) -> _Cost:
        level = self.levels[layer.level]
        n = self.lengths[layer.level]
        vocab, d = self.model.padded_vocab, level.d_model
        match layer.kind:
            case "embedding":
                return _Cost(vocab * d)
            case "head":
                return self.linear(n, d, vocab)
            case "norm":
                return self.norm(d)
            case "block":
                parts = self.block_parts(level, n)
            case "shorten":
                parts = self.shorten(layer.level)
            case "upsample":
                parts = self.upsample(layer.level)
        return sum(parts, _Cost())

    def linear(self, n: int, d_in: int, d_out: int) -> _Cost:
        flops = 2 * n * d_in * d_out
        parameters = d_in * d_out + (d_out if self.model.bias else 0)
        return _Cost(parameters, flops, flops, flops, 2 * flops, flops)

    def norm(self, d: int) -> _Cost:
        return _Cost(self.norm_width * d)

    def feed_forward(self, level: Level, n: int) -> _Cost:
        gates = 2 if self.model.activation == "swiglu" else 1
        up = self.linear(n, level.d_model, gates * level.d_ff)
        down = self.linear(n, level.d_ff, level.d_model)
        if not (self.kernels.drops and self.model.dropout):
            # torch's checkpoint stops at the last tensor that is needed; dropout's comes after it.
            down = replace(down, recomputed=0)
        return up + down

    def block_parts(self, level: Level, n: int) -> Iterator[_Cost]:
        yield self.norm(level.d_model) + self.norm(level.d_model)
        yield from self.attention(level, level, Pairing(n, n, window=level.window), level.positions)
        yield self.feed_forward(level, n)

    def attention(
        self, query: Level, key: Level, pairing: Pairing, positions: str
    ) -> Iterator[_Cost]:
        """Count the parts of attention; `positions`: of the longer sequence."""
        n, m, d, relative = pairing.n, pairing.m, query.d_model, positions == "relative"
        executed = executed_pairs(pairing, relative, self.model.dropout > 0, self.kernels)
        yield self.linear(n, d, d)
        yield self.linear(m, key.d_model, 2 * d)
        yield self.linear(n, d, d)
        yield self.products(pairing, d, executed.contents, executed.fused)  # scores
        yield self.products(pairing, d, executed.contents, executed.fused)  # values
        if relative:
            yield self.products(pairing, d, executed.by_distance)
            table = 2 * executed.table * d * d
            # The sinusoids get no gradient.
            projection = self.linear(pairing.distances, d, d)
            yield replace(projection, executed=table, backward=table, recomputed=table)
            if not self.model.shared_position_bias:
                yield _Cost(2 * d)
        if self.model.qk_norm:
            yield _Cost(2 * d)

    def products(self, pairing: Pairing, d: int, executed: int, fused: bool = False) -> _Cost:
        """Count one product of queries and keys, or of probabilities and values."""
        full, flops = 2 * pairing.n * pairing.width * d, 2 * executed * d
        backward, forward = _FUSED_BACKWARD if fused else (2, 1)
        return _Cost(0, full, 2 * pairing.visible() * d, flops, backward * flops // forward, flops)

    def resampling_attention(
        self, query: Level, key: Level, pairing: Pairing, positions: str
    ) -> Iterator[_Cost]:
        yield self.norm(key.d_model) + self.norm(query.d_model) + self.norm(query.d_model)
        yield from self.attention(query, key, pairing, positions)
        yield self.feed_forward(query, pairing.n)

    def shorten(self, j: int) -> Iterator[_Cost]:
        k = self.factors[j]
        upper, lower = self.levels[j], self.levels[j + 1]
        n, kind = self.lengths[j + 1], self.model.pooling_kind
        projection = pooling_projection(kind, k, upper.d_model, lower.d_model)
        if projection:
            yield self.linear(n, *projection)
        if kind.attends:
            pairing = Pairing(n, n * k, query_step=k, crosses=True)
            yield from self.resampling_attention(lower, upper, pairing, upper.positions)

    def upsample(self, j: int) -> Iterator[_Cost]:
        k = self.factors[j]
        upper, lower = self.levels[j], self.levels[j + 1]
        n, m, kind = self.lengths[j], self.lengths[j + 1], self.model.upsampling_kind
        yield self.norm(upper.d_model)
        if self.model.skip == "learned":
            yield _Cost(upper.d_model)
        projection = upsampling_projection(kind, k, upper.d_model, lower.d_model)
        if projection:
            yield self.linear(m, *projection)
        if kind.attends:
            pairing = Pairing(n, m, key_step=k, crosses=True)
            yield from self.resampling_attention(upper, lower, pairing, upper.positions)
