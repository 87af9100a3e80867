"""Checks of the model: its levels, shapes, and the memory of its attention."""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm, prod

from hg_scale.config.arithmetic import divisors, near_multiples, nearest
from hg_scale.config.errors import Problem
from hg_scale.config.schema import Config, ModelConfig

SCORES_LIMIT = 8192  # positions; beyond it, B x H x L x L scores take over 0.25 GB a head in fp32
FACTORS_LIMIT = 10_000  # draws of shorten factors, all of which a dry run counts


def model_problems(config: Config) -> Iterator[Problem]:
    """Faults of the section `model`, and of lists by level in others."""
    yield from _levels(config)
    yield from _shapes(config)


_BY_LEVEL = (
    "model.d_model",
    "model.heads",
    "model.d_ff",
    "model.window",
    "model.positions",
    "optimizer.learning_rate_by_level",
    "training.activation_checkpointing",
)


def _get(config: Config, path: str) -> object:
    section, key = path.split(".")
    return getattr(getattr(config, section), key)


def _levels(config: Config) -> Iterator[Problem]:
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


def whole_lists(config: Config, *paths: str) -> bool:
    """Whether by-level lists have the right lengths, so that they can be read side by side."""
    levels = config.model.parsed.level_count
    values = (_get(config, path) for path in paths)
    return all(not isinstance(v, list) or len(v) == levels for v in values)


def _shapes(config: Config) -> Iterator[Problem]:
    model, size = config.model, config.parallel.tensor
    if whole_lists(config, "model.d_model", "model.heads", "model.positions"):
        widths, heads = model.by_level("d_model"), model.by_level("heads")
        rotary = [p == "rotary" for p in model.by_level("positions")]
        # Attention pooling: queries of the lower level, positions of the upper one.
        pooled = list(enumerate(rotary[:-1])) if "attention" in model.pooling else []
        turning = {level for level, turns in enumerate(rotary) if turns}
        turning |= {level + 1 for level, turns in pooled if turns}
        for level, (width, count) in enumerate(zip(widths, heads, strict=True)):
            others = ("model.d_model", "model.positions", "model.hierarchy", "parallel.tensor")
            where = f" at level {level}" if len(widths) > 1 else ""
            fault = None
            if width % count:
                fault = f"{count} heads do not divide d_model {width}{where}"
            elif rotary[level] and (width // count) % 2:
                fault = f"rotary positions need an even head width, got {width // count}{where}"
            elif count % size:
                fault = f"must be a multiple of parallel.tensor {size}, got {count}{where}"
            if fault:
                step = 2 if level in turning else 1
                legal = [h for h in divisors(width) if h % size == 0 and width // h % step == 0]
                near = " or ".join(map(str, nearest(legal, count, 2)))
                remedy = f"nearest that do: {near}" if near else "none do with this d_model"
                yield Problem("model.heads", f"{fault}; {remedy}", model.heads, others)
            if not rotary[level] and width % 2:
                yield Problem(
                    "model.d_model",
                    f"relative positions need an even width, got {width}{where}",
                    model.d_model,
                    others,
                )
        for level, turns in pooled:
            width, count = widths[level + 1], heads[level + 1]
            if width % (2 * count if turns else 2):
                kind = "rotary" if turns else "relative"
                yield Problem(
                    "model.pooling",
                    f"attention from level {level + 1} to {level} has the {kind} positions of the "
                    f"latter, which need an even {'head width' if turns else 'width'} at level "
                    f"{level + 1}; choose d_model and heads so, or pooling without attention",
                    model.pooling,
                    ("model.d_model", "model.heads", "model.positions"),
                )
        if model.shared_position_bias:
            relative = {level for level, turns in enumerate(rotary) if not turns}
            relative |= {level + 1 for level, turns in pooled if not turns}
            shapes = {
                (heads[s], widths[s] // heads[s]) for s in relative if widths[s] % heads[s] == 0
            }
            if len(shapes) > 1:
                yield Problem(
                    "model.shared_position_bias",
                    "one pair of biases needs equal heads and widths at all levels with relative "
                    "positions, and at those that attention pools from one; use false",
                    True,
                    ("model.heads", "model.d_model", "model.positions"),
                )
            if not relative:
                yield Problem(
                    "model.shared_position_bias",
                    "no level has relative positions; use false",
                    True,
                    ("model.positions",),
                )
    total = model.parsed.total_factor
    if model.shorten_factor_choices is not None:
        yield from _shorten_factors(model)
    elif model.sequence_length % total:
        yield Problem(
            "model.sequence_length",
            f"training windows must be a multiple of {total}, the product of the factors of "
            f"'{model.hierarchy}'; nearest: {near_multiples(model.sequence_length, total)}",
            model.sequence_length,
            ("model.hierarchy",),
        )
    if whole_lists(config, "model.positions", "model.window"):
        yield from _scores(model)


def _scores(model: ModelConfig) -> Iterator[Problem]:
    """Attention that holds all scores: with relative positions, or dropout of probabilities."""
    factors = (1, *(level.factor for level in model.parsed.shortenings))
    kinds, windows = model.by_level("positions"), model.by_level("window")
    inputs = ["sequence_length", "window", "hierarchy", "positions", "dropout"]
    others = tuple(f"model.{key}" for key in [*inputs, "pooling", "upsampling"])
    lengths = [-(-model.sequence_length // factor) for factor in factors]
    resampled = "attention" in model.pooling or "attention" in model.upsampling
    for level, (n, kind, window) in enumerate(zip(lengths, kinds, windows, strict=True)):
        full = n if window is None or window >= n else 0
        sides = [(full, full, "full attention")]
        if resampled and level + 1 < len(lengths):
            sides.append((n, lengths[level + 1], "resampling attention"))
        for queries, keys, what in sides:
            if (kind == "rotary" and not model.dropout) or queries * keys <= SCORES_LIMIT**2:
                continue
            relative = kind == "relative"
            remedy = "rotary" if relative else "dropout 0"
            if what == "full attention":
                remedy += ", or a window"
            yield Problem(
                "model.positions" if relative else "model.dropout",
                f"{'relative scores' if relative else 'probabilities with dropout'} of {what} "
                f"take (batch x heads x {queries} x {keys}) of memory at level {level}; over "
                f"{SCORES_LIMIT} x {SCORES_LIMIT} use {remedy}",
                kind if relative else model.dropout,
                others,
            )


def _shorten_factors(model: ModelConfig) -> Iterator[Problem]:
    choices, levels = model.shorten_factor_choices, model.parsed.shortenings
    path, others = "model.shorten_factor_choices", ("model.hierarchy",)
    if not levels:
        yield Problem(path, "a flat model has no shortening to draw for; use null", choices, others)
        return
    lists = model.factor_choices or []
    if len(lists) != len(levels):
        yield Problem(
            path,
            f"needs one list for each of the {len(levels)} shortenings, got {len(lists)}",
            choices,
            others,
        )
    elif not all(lists):
        yield Problem(path, "a level has nothing to draw from", choices)
    for key, value in (("pooling", model.pooling), ("upsampling", model.upsampling)):
        if "linear" in value:
            yield Problem(
                path,
                f"model.{key} '{value}' has weights for one factor only; use average pooling and "
                "repeat upsampling, with or without attention",
                choices,
                (f"model.{key}",),
            )
    if all(lists) and lists:
        # The least multiple of all products is the product of the least multiples by level.
        unit, draws = prod(lcm(*options) for options in lists), prod(map(len, lists))
        if max(unit, draws) > FACTORS_LIMIT:
            yield Problem(
                path,
                f"{draws:,} draws, whose products have {unit:,} as their least common multiple; "
                f"use fewer or smaller factors, so that neither is over {FACTORS_LIMIT:,}",
                choices,
                others,
            )
