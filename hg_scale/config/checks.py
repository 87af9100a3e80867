"""Checks that involve more than one key. Each message names values that are valid."""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm

from hg_scale.config.arithmetic import divisors, nearest, nearest_multiples
from hg_scale.config.constants import SWIGLU_CHUNKS
from hg_scale.config.deepspeed import deepspeed_problems
from hg_scale.config.errors import Problem
from hg_scale.config.model_checks import lists_match_levels, model_problems
from hg_scale.config.schema import Config


def cross_checks(config: Config, world_size: int | None = None) -> list[Problem]:
    """Return all problems of key combinations; `world_size`: None skips the checks against it."""
    return [
        *model_problems(config),
        *_tensor_parallel(config),
        *_batches(config, world_size),
        *_parallel(config, world_size),
        *_data(config),
        *_checkpoint(config),
        *_schedule(config),
        *_schedule_kind(config),
        *_optimizer(config),
        *deepspeed_problems(config),
    ]


def _tensor_parallel(config: Config) -> Iterator[Problem]:
    size, model = config.parallel.tensor, config.model
    if size == 1:
        return
    for path in ("model.d_ff", "model.d_model"):
        if not lists_match_levels(config, path):
            continue
        for level, value in enumerate(model.by_level(path.removeprefix("model."))):
            if value % size:
                yield Problem(
                    path,
                    f"must be a multiple of parallel.tensor {size} at every level, got {value} at "
                    f"level {level}; nearest: {nearest_multiples(value, size)}",
                    getattr(model, path.removeprefix("model.")),
                    ("parallel.tensor",),
                )
    if model.activation == "swiglu" and SWIGLU_CHUNKS % size:
        sizes = ", ".join(map(str, divisors(SWIGLU_CHUNKS)))
        yield Problem(
            "parallel.tensor",
            f"swiglu can be sharded over {sizes} ranks only; use one of these, or gelu",
            size,
            ("model.activation",),
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
    model_parallel = parallel.tensor * parallel.pipeline
    divides = world_size and world_size % model_parallel == 0
    ranks = world_size // model_parallel if world_size and divides else 1
    batch, micro = training.global_batch_size, training.micro_batch_size
    if batch % (micro * ranks) == 0:
        return
    spread = f" x {ranks} data-parallel ranks" if ranks > 1 else ""
    per_rank = batch // ranks if batch % ranks == 0 else 0
    valid = nearest(divisors(per_rank), micro, 6)
    remedy = f"nearest global batches: {nearest_multiples(batch, micro * ranks)}"
    if valid:
        remedy += f"; valid micro-batches for {batch}: {', '.join(map(str, valid))}"
    if ranks > 1 and batch % micro == 0:
        sizes = nearest(divisors(batch // micro), ranks, 12)
        remedy += f"; data-parallel sizes that fit: {', '.join(map(str, sizes))}"
    yield Problem(
        "training.global_batch_size",
        f"must be a multiple of micro_batch_size {micro}{spread} = {micro * ranks}; {remedy}",
        batch,
        ("training.micro_batch_size", "parallel.tensor", "parallel.pipeline"),
    )


def _parallel(config: Config, world_size: int | None) -> Iterator[Problem]:
    parallel, training = config.parallel, config.training
    stages = parallel.pipeline
    if stages > 1 and parallel.zero_stage >= 2:
        yield Problem(
            "parallel.zero_stage",
            "a pipeline accumulates unsharded gradients over its micro-batches, and ZeRO 2 and 3 "
            "shard them after each one (DeepSpeed refuses it); use 1, or pipeline = 1",
            parallel.zero_stage,
            ("parallel.pipeline",),
        )
    if training.precision == "bf16" and parallel.zero_stage == 0:
        yield Problem(
            "parallel.zero_stage",
            "bf16 needs stage 1 or more: with 0 DeepSpeed uses other optimizers, one with a wrong "
            "Adam step; stage 1 on one rank is equivalent",
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
    model_parallel = parallel.tensor * stages
    if world_size and world_size % model_parallel:
        near = nearest_multiples(world_size, model_parallel)
        yield Problem(
            "parallel.tensor",
            f"{world_size} processes cannot be split into tensor {parallel.tensor} x pipeline "
            f"{stages} x data; start a multiple of {model_parallel}, such as {near}",
            parallel.tensor,
            ("parallel.pipeline",),
        )


def _data(config: Config) -> Iterator[Problem]:
    data = config.data
    if data.path is not None and data.sources is not None:
        yield Problem("data.path", "is set besides data.sources; remove one of the two", data.path)
    labels = [source.label for source in data.sources or []]
    for label in dict.fromkeys(label for label in labels if labels.count(label) > 1):
        yield Problem(
            "data.sources",
            f"{labels.count(label)} sources have the name {label!r}; set a unique `name` for each",
        )


def _checkpoint(config: Config) -> Iterator[Problem]:
    checkpoint = config.checkpoint
    if checkpoint.keep_every and not checkpoint.keep_last:
        yield Problem(
            "checkpoint.keep_every",
            "adds to checkpoint.keep_last, which is 0 and keeps all; set both",
            checkpoint.keep_every,
            ("checkpoint.keep_last",),
        )
    if checkpoint.keep_every and checkpoint.every and checkpoint.keep_every % checkpoint.every:
        yield Problem(
            "checkpoint.keep_every",
            f"must be a multiple of checkpoint.every {checkpoint.every}, or few checkpoints fall "
            f"on it; nearest: {nearest_multiples(checkpoint.keep_every, checkpoint.every)}",
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
    if schedule.kind == "wsd" and schedule.decay_steps == 0:
        room, tenth = steps - schedule.warmup_steps, max(1, steps // 10)
        decay = min(tenth, room) if room > 0 else tenth
        yield Problem(
            "schedule.decay_steps",
            f"warm-up, stable, decay needs a decay, such as {decay}",
            0,
            ("schedule.kind", "training.steps", "schedule.warmup_steps"),
        )


def _schedule_kind(config: Config) -> Iterator[Problem]:
    """Check for keys that another kind of schedule uses."""
    schedule = config.schedule
    if schedule.kind == "cosine" and schedule.decay_steps:
        yield Problem(
            "schedule.decay_steps",
            "a cosine decays from the warm-up to the end; use 0, or kind wsd or rsqrt",
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
    if schedule.kind != "wsd" and schedule.decay_shape != "linear":
        yield Problem(
            "schedule.decay_shape",
            f"belongs to kind wsd; with {schedule.kind} leave it out",
            schedule.decay_shape,
            ("schedule.kind",),
        )


def _optimizer(config: Config) -> Iterator[Problem]:
    optimizer = config.optimizer
    if optimizer.name == "adam" and optimizer.weight_decay:
        yield Problem(
            "optimizer.weight_decay",
            "adam has no weight decay here; use 0, or adamw for decoupled decay",
            optimizer.weight_decay,
            ("optimizer.name",),
        )
