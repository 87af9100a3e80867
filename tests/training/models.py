"""Two small configurations that cover most of the model, and training of them in any layout."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from hg_scale.config.load import parse_config
from hg_scale.config.read import merge

PAPER: dict[str, Any] = {
    "model": {
        "hierarchy": "1@1 2@3 1@1",
        "d_model": 32,
        "heads": 4,
        "d_ff": 64,
        "vocab_size": 64,
        "sequence_length": 30,
        "shared_position_bias": True,
    },
    "training": {"global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32", "steps": 20},
    "optimizer": {"name": "adam", "weight_decay": 0.0, "learning_rate": 1e-3},
    "schedule": {"kind": "cosine", "warmup_steps": 4},
}
"""As in the paper: attention resampling, relative scores with one pair of biases, Adam."""

BY_LEVEL: dict[str, Any] = {
    "model": {
        "hierarchy": "2@1 1@2 2@4 1@2 1@1",
        "d_model": [32, 48, 64],
        "heads": [4, 4, 8],
        "d_ff": [64, 96, 128],
        "window": [8, 8, None],
        "vocab_size": 61,
        "sequence_length": 32,
        "pooling": "average",
        "upsampling": "linear",
        "skip": "learned",
        "positions": "rotary",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "qk_norm": True,
        "bias": False,
        "initialization": "scaled_normal",
    },
    "training": {"global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32", "steps": 20},
    "optimizer": {"learning_rate": 1e-3, "learning_rate_by_level": [1.0, 0.8, 0.5]},
    "schedule": {"kind": "wsd", "warmup_steps": 4, "decay_steps": 4},
}
"""As in the presets: widths, windows and learning rates by level, rotary, SwiGLU, AdamW."""


def layout(
    tree: dict[str, Any],
    tensor: int = 1,
    pipeline: int = 1,
    zero: int = 1,
    precision: str = "fp32",
    micro: int = 2,
    **model: Any,
) -> dict[str, Any]:
    """The configuration in a layout, with changes to the model."""
    change = {
        "parallel": {"tensor": tensor, "pipeline": pipeline, "zero_stage": zero},
        "training": {"precision": precision, "micro_batch_size": micro},
        "model": model,
    }
    if zero == 3:  # by default ZeRO 3 does not shard parameters this small
        change["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return merge(tree, change)


def random_batch(config: Any, step: int) -> torch.Tensor:
    """The global batch of a step: (global_batch_size, L + 1) ids, half of them predictable."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (config.training.global_batch_size, config.model.sequence_length + 1)
    ids = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    ids[:, 1::2] = ids[:, 0:-1:2]  # every second token repeats the one before
    return ids


def build_engine(tree: dict[str, Any]) -> Any:
    """The engine of this rank, in a world whose size fits the layout."""
    from hg_scale.parallel.mesh import make_mesh
    from hg_scale.training.engine import make_engine

    config = parse_config(tree, world_size=dist.get_world_size())
    mesh, layers = make_mesh(config.parallel)
    return make_engine(config, mesh, layers, torch.device("cpu"))


def local_batch(engine: Any, step: int) -> torch.Tensor | None:
    """This rank's sequences of `random_batch`; None on a stage that needs no tokens."""
    if not (engine.mesh.is_first_stage or engine.mesh.is_last_stage):
        return None
    return random_batch(engine.config, step)[engine.local_samples]


def run_layout(tree: dict[str, Any], steps: int) -> dict[str, list[float]]:
    """Train in this world for `steps`: losses, gradient norms, and a validation loss."""
    engine = build_engine(tree)
    config = engine.config
    results = [
        engine.train_step(local_batch(engine, step), step, 1e-3) for step in range(1, steps + 1)
    ]
    validation = local_batch(engine, 0)
    micro = config.training.micro_batch_size
    if validation is None:
        batches: list[Any] = [None] * (engine.local_batch_size // micro)
    else:
        batches = [(m[:, :-1], m[:, 1:]) for m in validation.split(micro)]
    nats = engine.evaluate(batches, config.model.sequence_length)
    tokens = config.training.global_batch_size * config.model.sequence_length
    return {
        "loss": [r.loss for r in results],
        "grad_norm": [r.grad_norm for r in results],
        "skipped": [float(r.skipped) for r in results],
        "validation": [nats / tokens],
    }
