"""Checks of the model: lists by level, head widths, shortening factors, memory of attention."""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm, prod

from hg_scale.config.arithmetic import divisors, nearest, nearest_multiples
from hg_scale.config.errors import Problem
from hg_scale.config.schema import Config, ModelConfig

SCORES_LIMIT = 8192  # positions; beyond it, B x H x L x L scores take over 0.25 GB per head in fp32
FACTORS_LIMIT = 10_000  # combinations of shorten factors, all of which a dry run counts

_BY_LEVEL = (
    "model.d_model",
    "model.heads",
    "model.d_ff",
    "model.window",
    "model.positions",
    "optimizer.learning_rate_by_level",
    "training.activation_checkpointing",
)


def model_problems(config: Config) -> Iterator[Problem]:
    """Check the section `model`, and the lists by level of other sections."""
    yield from _list_lengths(config)
    model = config.model
    if lists_match_levels(config, "model.d_model", "model.heads", "model.positions"):
        yield from _widths(model, config.parallel.tensor)
        yield from _pooling_attention(model)
        if model.shared_position_bias:
            yield from _shared_position_bias(model)
    if model.shorten_factor_choices is not None:
        yield from _factor_choices(model)
    else:
        yield from _sequence_length(model)
    if lists_match_levels(config, "model.positions", "model.window"):
        yield from _score_memory(model)


def _get(config: Config, path: str) -> object:
    section, key = path.split(".")
    return getattr(getattr(config, section), key)


def _list_lengths(config: Config) -> Iterator[Problem]:
    levels = config.model.parsed.level_count
    for path in _BY_LEVEL:
        value = _get(config, path)
        if isinstance(value, list) and len(value) != levels:
            yield Problem(
                path,
                f"a list by level needs {levels} entries for hierarchy "
                f"'{config.model.hierarchy}' (full length first), got {len(value)}",
                value,
                ("model.hierarchy",),
            )


def lists_match_levels(config: Config, *paths: str) -> bool:
    """Whether lists by level have one entry per level, so that they can be compared."""
    levels = config.model.parsed.level_count
    values = (_get(config, path) for path in paths)
    return all(not isinstance(v, list) or len(v) == levels for v in values)


def _levels_with(model: ModelConfig, positions: str) -> tuple[set[int], set[int]]:
    """Return the levels with this kind of positions, and those that attend to such a level.

    In attention pooling, queries of the lower level have the positions of the upper one.
    """
    own = {level for level, kind in enumerate(model.by_level("positions")) if kind == positions}
    deepest = model.parsed.level_count - 1
    pooled = (
        {level + 1 for level in own if level < deepest} if model.pooling_kind.attends else set()
    )
    return own, pooled


def _widths(model: ModelConfig, tensor: int) -> Iterator[Problem]:
    """Check widths and heads against each other, the positions, and tensor parallelism."""
    widths, heads = model.by_level("d_model"), model.by_level("heads")
    rotary, pooled_by_rotary = _levels_with(model, "rotary")
    depends_on = ("model.d_model", "model.positions", "model.hierarchy", "parallel.tensor")
    for level, (width, count) in enumerate(zip(widths, heads, strict=True)):
        where = f" at level {level}" if len(widths) > 1 else ""
        message = None
        if width % count:
            message = f"{count} heads do not divide d_model {width}{where}"
        elif level in rotary and (width // count) % 2:
            message = f"rotary positions need an even head width, got {width // count}{where}"
        elif count % tensor:
            message = f"must be a multiple of parallel.tensor {tensor}, got {count}{where}"
        if message:
            step = 2 if level in rotary | pooled_by_rotary else 1
            valid = [h for h in divisors(width) if h % tensor == 0 and width // h % step == 0]
            near = " or ".join(map(str, nearest(valid, count, 2)))
            remedy = f"nearest valid: {near}" if near else "no number is valid with this d_model"
            yield Problem("model.heads", f"{message}; {remedy}", model.heads, depends_on)
        if level not in rotary and width % 2:
            yield Problem(
                "model.d_model",
                f"relative positions need an even width, got {width}{where}",
                model.d_model,
                depends_on,
            )


def _pooling_attention(model: ModelConfig) -> Iterator[Problem]:
    """Check that a level can attend with the positions of the level above it."""
    if not model.pooling_kind.attends:
        return
    widths, heads = model.by_level("d_model"), model.by_level("heads")
    for level, kind in enumerate(model.by_level("positions")[:-1]):
        width, count = widths[level + 1], heads[level + 1]
        rotary = kind == "rotary"
        if width % (2 * count if rotary else 2):
            yield Problem(
                "model.pooling",
                f"attention from level {level + 1} to {level} has the {kind} positions of the "
                f"latter, which need an even {'head width' if rotary else 'width'} at level "
                f"{level + 1}; change d_model or heads, or use pooling without attention",
                model.pooling,
                ("model.d_model", "model.heads", "model.positions"),
            )


def _shared_position_bias(model: ModelConfig) -> Iterator[Problem]:
    widths, heads = model.by_level("d_model"), model.by_level("heads")
    own, pooled = _levels_with(model, "relative")
    levels = own | pooled
    shapes = {
        (heads[level], widths[level] // heads[level])
        for level in levels
        if widths[level] % heads[level] == 0
    }
    if len(shapes) > 1:
        yield Problem(
            "model.shared_position_bias",
            "one pair of biases needs equal heads and widths at all levels with relative "
            "positions, and at those that attention pools from one; use false",
            True,
            ("model.heads", "model.d_model", "model.positions"),
        )
    if not levels:
        yield Problem(
            "model.shared_position_bias",
            "no level has relative positions; use false",
            True,
            ("model.positions",),
        )


def _sequence_length(model: ModelConfig) -> Iterator[Problem]:
    total = model.parsed.total_factor
    if model.sequence_length % total:
        yield Problem(
            "model.sequence_length",
            f"must be a multiple of {total}, the product of the factors of '{model.hierarchy}'; "
            f"nearest: {nearest_multiples(model.sequence_length, total)}",
            model.sequence_length,
            ("model.hierarchy",),
        )


def _score_memory(model: ModelConfig) -> Iterator[Problem]:
    """Check attention that materialises its scores: relative positions, or attention dropout."""
    factors = (1, *(level.factor for level in model.parsed.shortenings))
    kinds, windows = model.by_level("positions"), model.by_level("window")
    inputs = ["sequence_length", "window", "hierarchy", "positions", "dropout"]
    depends_on = tuple(f"model.{key}" for key in [*inputs, "pooling", "upsampling"])
    lengths = [-(-model.sequence_length // factor) for factor in factors]
    resampling_attends = model.pooling_kind.attends or model.upsampling_kind.attends
    for level, (n, kind, window) in enumerate(zip(lengths, kinds, windows, strict=True)):
        full = n if window is None or window >= n else 0
        attentions = [(full, full, "full attention")]
        if resampling_attends and level + 1 < len(lengths):
            attentions.append((n, lengths[level + 1], "resampling attention"))
        for queries, keys, name in attentions:
            if (kind == "rotary" and not model.dropout) or queries * keys <= SCORES_LIMIT**2:
                continue
            relative = kind == "relative"
            remedy = "rotary" if relative else "dropout 0"
            if name == "full attention":
                remedy += ", or a window"
            yield Problem(
                "model.positions" if relative else "model.dropout",
                f"{'relative scores' if relative else 'probabilities with dropout'} of {name} "
                f"take (batch x heads x {queries} x {keys}) of memory at level {level}; over "
                f"{SCORES_LIMIT} x {SCORES_LIMIT} use {remedy}",
                kind if relative else model.dropout,
                depends_on,
            )


def _factor_choices(model: ModelConfig) -> Iterator[Problem]:
    """Check shorten-factor dropout."""
    choices, shortenings = model.shorten_factor_choices, model.parsed.shortenings
    path, depends_on = "model.shorten_factor_choices", ("model.hierarchy",)
    if not shortenings:
        message = "a flat model has no shortening to draw factors for; use null"
        yield Problem(path, message, choices, depends_on)
        return
    lists = model.factor_choices or []
    if len(lists) != len(shortenings):
        yield Problem(
            path,
            f"needs one list for each of the {len(shortenings)} shortenings, got {len(lists)}",
            choices,
            depends_on,
        )
    elif not all(lists):
        yield Problem(path, "a shortening has no factor to draw", choices)
    kinds = {"pooling": model.pooling_kind, "upsampling": model.upsampling_kind}
    for key, kind in kinds.items():
        if kind.has_fixed_factor:
            yield Problem(
                path,
                f"model.{key} '{getattr(model, key)}' has weights for one factor only; use average "
                "pooling and repeat upsampling, with or without attention",
                choices,
                (f"model.{key}",),
            )
    if all(lists) and lists:
        # The least multiple of all products is the product of the least multiples by level.
        multiple, draws = prod(lcm(*options) for options in lists), prod(map(len, lists))
        if max(multiple, draws) > FACTORS_LIMIT:
            yield Problem(
                path,
                f"{draws:,} combinations, whose products have {multiple:,} as their least common "
                f"multiple; use fewer or smaller factors, so that neither exceeds "
                f"{FACTORS_LIMIT:,}",
                choices,
                depends_on,
            )
