"""Checks that involve more than one key. Each problem says which values would do."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import gcd, lcm, prod

from hg_scale.config.deepspeed import deepspeed_problems
from hg_scale.config.errors import Problem
from hg_scale.config.schema import Config, ModelConfig

SCORES_LIMIT = 8192  # positions; beyond it, B x H x L x L scores take over 0.25 GB a head in fp32
SWIGLU_CHUNKS = 64  # gate and up rows alternate in this many chunks, so tensor slices are whole


def cross_checks(config: Config, world_size: int | None = None) -> list[Problem]:
    """All faults of combinations; `world_size` is checked where it is known."""
    return [
        *_levels(config),
        *_model(config),
        *_tensor_parallel(config),
        *_batches(config, world_size),
        *_parallel(config, world_size),
        *_data(config),
        *_checkpoint(config),
        *_schedule(config),
        *deepspeed_problems(config),
    ]


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
    scales = config.model.parsed.scales
    for path in _BY_LEVEL:
        value = _get(config, path)
        if isinstance(value, list) and len(value) != scales:
            yield Problem(
                path,
                f"a list by level needs {scales} entries for hierarchy "
                f"'{config.model.hierarchy}' (full length first), got {len(value)}",
                value,
                ("model.hierarchy",),
            )


def _whole_lists(config: Config, *paths: str) -> bool:
    """Whether by-level lists have the right lengths, so that they can be read side by side."""
    scales = config.model.parsed.scales
    values = (_get(config, path) for path in paths)
    return all(not isinstance(v, list) or len(v) == scales for v in values)


def _near_multiples(value: int, unit: int) -> str:
    """The multiples of `unit` around `value`, in words."""
    below, above = value // unit * unit, -(-value // unit) * unit
    return f"{below} or {above}" if below else f"{above}"


def _model(config: Config) -> Iterator[Problem]:
    model, hierarchy = config.model, config.model.parsed
    if _whole_lists(config, "model.d_model", "model.heads", "model.positions"):
        widths, heads = model.by_level("d_model"), model.by_level("heads")
        rotary = [p == "rotary" for p in model.by_level("positions")]
        for scale, (width, count) in enumerate(zip(widths, heads, strict=True)):
            others = ("model.d_model", "model.positions", "model.hierarchy")
            where = f" at level {scale}" if len(widths) > 1 else ""
            if width % count:
                legal = [h for h in range(1, min(width, 257)) if width % h == 0]
                near = sorted(sorted(legal, key=lambda h: abs(h - count))[:2])
                yield Problem(
                    "model.heads",
                    f"{count} heads do not divide d_model {width}{where}; "
                    f"nearest that do: {' or '.join(map(str, near))}",
                    model.heads,
                    others,
                )
            elif rotary[scale] and (width // count) % 2:
                yield Problem(
                    "model.heads",
                    f"rotary positions need an even head width, got {width // count}{where}",
                    model.heads,
                    others,
                )
            if not rotary[scale] and width % 2:
                yield Problem(
                    "model.d_model",
                    f"relative positions need an even width, got {width}{where}",
                    model.d_model,
                    others,
                )
        # Attention pooling: queries of the lower level, positions of the upper one.
        pooled = list(enumerate(rotary[:-1])) if "attention" in model.pooling else []
        for scale, turns in pooled:
            width, count = widths[scale + 1], heads[scale + 1]
            if width % (2 * count if turns else 2):
                kind = "rotary" if turns else "relative"
                yield Problem(
                    "model.pooling",
                    f"attention from level {scale + 1} to {scale} has the {kind} positions of the "
                    f"latter, which need an even {'head width' if turns else 'width'} at level "
                    f"{scale + 1}; choose d_model and heads so, or pooling without attention",
                    model.pooling,
                    ("model.d_model", "model.heads", "model.positions"),
                )
        if model.shared_position_bias:
            relative = {scale for scale, turns in enumerate(rotary) if not turns}
            relative |= {scale + 1 for scale, turns in pooled if not turns}
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
            if not shapes:
                yield Problem(
                    "model.shared_position_bias",
                    "no level has relative positions; use false",
                    True,
                    ("model.positions",),
                )
    choices = model.shorten_factor_choices
    total = hierarchy.total_factor
    if choices is not None:
        yield from _shorten_factors(model)
    elif model.sequence_length % total:
        yield Problem(
            "model.sequence_length",
            f"training windows must be a multiple of {total}, the product of the factors of "
            f"'{model.hierarchy}'; nearest: {_near_multiples(model.sequence_length, total)}",
            model.sequence_length,
            ("model.hierarchy",),
        )
    if _whole_lists(config, "model.positions", "model.window"):
        yield from _scores(model)


def _scores(model: ModelConfig) -> Iterator[Problem]:
    """Attention that holds all scores: with relative positions, or dropout of probabilities."""
    factors = (1, *(level.factor for level in model.parsed.levels))
    kinds, windows = model.by_level("positions"), model.by_level("window")
    others = ("model.sequence_length", "model.window", "model.hierarchy")
    lengths = [-(-model.sequence_length // factor) for factor in factors]
    resampled = "attention" in model.pooling or "attention" in model.upsampling
    for scale, (n, kind, window) in enumerate(zip(lengths, kinds, windows, strict=True)):
        full = n if window is None or window >= n else 0
        sides = [(full, full, "full attention")]
        if resampled and scale + 1 < len(lengths):
            sides.append((n, lengths[scale + 1], "resampling attention"))
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
                f"take (batch x heads x {queries} x {keys}) of memory at level {scale}; over "
                f"{SCORES_LIMIT} x {SCORES_LIMIT} use {remedy}",
                kind if relative else model.dropout,
                (*others, "model.pooling", "model.upsampling"),
            )


def _shorten_factors(model: ModelConfig) -> Iterator[Problem]:
    choices, levels = model.shorten_factor_choices, model.parsed.levels
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
        sets = [sorted(set(options)) for options in lists]
        unit = lcm(*(prod(draw) for draw in product(*sets)))
        if unit > 10_000:
            yield Problem(path, "the products of these factors are too large", choices)


def _tensor_parallel(config: Config) -> Iterator[Problem]:
    size, model = config.parallel.tensor, config.model
    if size == 1:
        return
    for path in ("model.heads", "model.d_ff", "model.d_model"):
        if not _whole_lists(config, path):
            continue
        for scale, value in enumerate(model.by_level(path.removeprefix("model."))):
            if value % size:
                yield Problem(
                    path,
                    f"must be a multiple of parallel.tensor {size} at every level, got {value} at "
                    f"level {scale}; nearest: {_near_multiples(value, size)}",
                    getattr(model, path.removeprefix("model.")),
                    ("parallel.tensor",),
                )
            elif path == "model.d_ff" and model.activation == "swiglu":
                chunks = gcd(value, SWIGLU_CHUNKS)
                if chunks % size:
                    yield Problem(
                        path,
                        f"{value} at level {scale} cannot be cut into gate and up for "
                        f"parallel.tensor {size}; nearest: "
                        f"{_near_multiples(value, lcm(size, SWIGLU_CHUNKS))}",
                        model.d_ff,
                        ("parallel.tensor", "model.activation"),
                    )
    if model.padded_vocab % size:
        yield Problem(
            "model.vocab_multiple",
            f"the padded vocabulary {model.padded_vocab} must be a multiple of parallel.tensor "
            f"{size}; use a multiple of {size}, such as {lcm(size, model.vocab_multiple)}",
            model.vocab_multiple,
            ("parallel.tensor", "model.vocab_size"),
        )


def _batches(config: Config, world_size: int | None) -> Iterator[Problem]:
    training, parallel = config.training, config.parallel
    fit = parallel.tensor * parallel.pipeline
    ranks = world_size // fit if world_size and world_size % fit == 0 else 1
    batch, micro = training.global_batch_size, training.micro_batch_size
    others = ("training.micro_batch_size", "parallel.tensor", "parallel.pipeline")
    if batch % (micro * ranks) == 0:
        return
    spread = f" x {ranks} data-parallel ranks" if ranks > 1 else ""
    each = batch // ranks if batch % ranks == 0 else 0  # rows a rank
    legal = [m for m in range(1, min(each, 4096) + 1) if each % m == 0][-6:]
    remedy = f"nearest global batches: {_near_multiples(batch, micro * ranks)}"
    if legal:
        remedy += f"; legal micro batches for {batch}: {', '.join(map(str, legal))}"
    if ranks > 1 and batch % micro == 0:
        sizes = [n for n in range(1, batch // micro + 1) if batch // micro % n == 0]
        remedy += f"; data-parallel sizes that fit: {', '.join(map(str, sizes))}"
    yield Problem(
        "training.global_batch_size",
        f"must be a multiple of micro_batch_size {micro}{spread} = {micro * ranks}; {remedy}",
        batch,
        others,
    )


def _parallel(config: Config, world_size: int | None) -> Iterator[Problem]:
    parallel, training = config.parallel, config.training
    stages = parallel.pipeline
    if stages > 1 and parallel.zero_stage >= 2:
        yield Problem(
            "parallel.zero_stage",
            "a pipeline keeps whole gradients while micro-batches are in flight, and ZeRO 2 and 3 "
            "would scatter them after each one (DeepSpeed refuses it); use 1, or pipeline = 1",
            parallel.zero_stage,
            ("parallel.pipeline",),
        )
    if training.precision == "bf16" and parallel.zero_stage == 0:
        yield Problem(
            "parallel.zero_stage",
            "bf16 needs stage 1 or more: with 0 DeepSpeed runs other optimizers, one with a wrong "
            "Adam step; stage 1 on one rank is the same",
            0,
            ("training.precision",),
        )
    hierarchy = config.model.parsed
    if stages > max(1, hierarchy.blocks):
        yield Problem(
            "parallel.pipeline",
            f"more stages than the {hierarchy.blocks} blocks of '{config.model.hierarchy}'",
            stages,
            ("model.hierarchy",),
        )
    fit = parallel.tensor * stages
    if world_size and world_size % fit:
        near = _near_multiples(world_size, fit)
        yield Problem(
            "parallel.tensor",
            f"{world_size} processes cannot be split into tensor {parallel.tensor} x pipeline "
            f"{stages} x data; start a multiple of {fit}, such as {near}",
            parallel.tensor,
            ("parallel.pipeline",),
        )


def _data(config: Config) -> Iterator[Problem]:
    data = config.data
    if data.path is not None and data.sources is not None:
        yield Problem("data.path", "is set beside data.sources; keep one of the two", data.path)
    labels = [source.label for source in data.sources or []]
    for label in dict.fromkeys(label for label in labels if labels.count(label) > 1):
        yield Problem(
            "data.sources",
            f"{labels.count(label)} sources are called {label!r}; give each a `name` of its own",
        )


def _checkpoint(config: Config) -> Iterator[Problem]:
    checkpoint = config.checkpoint
    if checkpoint.keep_every and not checkpoint.keep_last:
        yield Problem(
            "checkpoint.keep_every",
            "names exceptions from checkpoint.keep_last, which is 0 and keeps all; set both",
            checkpoint.keep_every,
            ("checkpoint.keep_last",),
        )
    if checkpoint.keep_every and checkpoint.every and checkpoint.keep_every % checkpoint.every:
        yield Problem(
            "checkpoint.keep_every",
            f"must be a multiple of checkpoint.every {checkpoint.every}, or few checkpoints fall "
            f"on it; nearest: {_near_multiples(checkpoint.keep_every, checkpoint.every)}",
            checkpoint.keep_every,
            ("checkpoint.every",),
        )


def _schedule(config: Config) -> Iterator[Problem]:
    schedule, steps = config.schedule, config.training.steps
    if schedule.warmup_steps >= steps:
        yield Problem(
            "schedule.warmup_steps",
            f"must be less than training.steps {steps}",
            schedule.warmup_steps,
            ("training.steps",),
        )
    elif schedule.warmup_steps + schedule.decay_steps > steps:
        yield Problem(
            "schedule.decay_steps",
            f"warm-up {schedule.warmup_steps} and decay {schedule.decay_steps} do not fit into "
            f"training.steps {steps}; at most {steps - schedule.warmup_steps}",
            schedule.decay_steps,
            ("training.steps", "schedule.warmup_steps"),
        )
    if schedule.kind == "cosine" and schedule.decay_steps:
        yield Problem(
            "schedule.decay_steps",
            "a cosine falls from the warm-up to the end; use 0, or kind wsd or rsqrt",
            schedule.decay_steps,
            ("schedule.kind",),
        )
    if schedule.kind != "cosine" and schedule.cycle_steps:
        yield Problem(
            "schedule.cycle_steps",
            f"belongs to kind cosine; with {schedule.kind} use null",
            schedule.cycle_steps,
            ("schedule.kind",),
        )
    if schedule.kind == "wsd" and schedule.decay_steps == 0:
        yield Problem(
            "schedule.decay_steps",
            f"warm-up, stable, decay needs a decay; about a tenth of training.steps, "
            f"{max(1, steps // 10)}",
            0,
            ("schedule.kind", "training.steps"),
        )
    optimizer = config.optimizer
    if optimizer.name == "adam" and optimizer.weight_decay:
        yield Problem(
            "optimizer.weight_decay",
            "adam has none here; use 0, or adamw for decoupled decay",
            optimizer.weight_decay,
            ("optimizer.name",),
        )
