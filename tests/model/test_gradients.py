"""Every parameter of every kind of layer takes part: it has a gradient, and moves in a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from hg_scale.config.load import parse_config
from hg_scale.config.schema import ModelConfig
from hg_scale.model.hourglass import Hourglass
from hg_scale.model.initialization import initialize_weights
from tests.training.models import BY_LEVEL, PAPER, layout, random_batch
from tests.world import Worlds

BASE = {"hierarchy": "1@1 1@2 1@4 1@2 1@1", "d_model": [16, 24, 32], "heads": 2, "d_ff": 32,
        "vocab_size": 64, "sequence_length": 24}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "relative": {"pooling": "attention+average", "upsampling": "attention+repeat"},
    "shared bias": {"shared_position_bias": True, "d_model": 16},
    "rotary": {"positions": "rotary", "qk_norm": True, "norm": "rmsnorm", "bias": False},
    "qk-norm, relative": {"qk_norm": True},
    "windows": {"window": [4, 4, None], "qk_norm": True, "positions": "rotary"},
    "relative windows": {"window": [4, 4, None]},
    "linear": {"pooling": "linear", "upsampling": "linear", "skip": "learned"},
    "attention+linear": {"pooling": "attention+linear", "upsampling": "attention+linear"},
    "average, repeat": {"pooling": "average", "upsampling": "repeat", "activation": "swiglu"},
    "attention+none": {"upsampling": "attention", "qk_norm": True, "positions": "rotary"},
}


def without_gradient(model: ModelConfig) -> list[str]:
    """Parameters whose gradient is missing or zero everywhere."""
    hourglass = Hourglass(model)
    initialize_weights(list(hourglass.named_parameters()), model, seed=1)
    with torch.no_grad():  # so that no branch is nearly zero at the start
        for parameter in hourglass.parameters():
            parameter += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.vocab_size, (2, model.sequence_length + 1), generator=generator)
    hourglass(ids[:, :-1], ids[:, 1:]).backward()
    return [
        name
        for name, parameter in hourglass.named_parameters()
        if parameter.grad is None or not bool(parameter.grad.abs().sum() > 0)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient(kind: str) -> None:
    assert without_gradient(ModelConfig(**(BASE | KINDS[kind]))) == []


def moments_that_are_zero(tree: dict[str, Any]) -> list[str]:
    """Parameters of this rank whose first moment is zero everywhere after two steps."""
    from hg_scale.checkpoint.local_state import local_states
    from hg_scale.parallel.mesh import make_mesh
    from hg_scale.training.engine import make_engine

    config = parse_config(tree, world_size=dist.get_world_size())
    mesh, parts = make_mesh(config.parallel)
    engine = make_engine(config, mesh, parts, torch.device("cpu"))
    reads = mesh.is_first_stage or mesh.is_last_stage
    for step in (1, 2):
        engine.train_step(
            random_batch(config, step)[engine.local_samples] if reads else None, step, 1e-3
        )
    return [
        local.fragment.slice.name
        for local in local_states(engine.deepspeed, engine.slices)
        if not bool(local.tensors["exp_avg"].any())
    ]


@pytest.mark.parametrize("tree", [PAPER, BY_LEVEL], ids=["paper", "by_level"])
@pytest.mark.parametrize(
    ("tensor", "pipeline", "stage", "precision"),
    [(1, 1, 0, "fp32"), (2, 1, 1, "fp32"), (1, 2, 1, "fp32"), (1, 1, 3, "bf16"),
     (1, 1, 1, "bf16"), (2, 1, 1, "bf16"), (1, 2, 1, "bf16")],
)  # fmt: skip
def test_every_parameter_has_a_moment_in_every_layout(
    worlds: Worlds, tree: dict[str, Any], tensor: int, pipeline: int, stage: int, precision: str
) -> None:
    size = 1 if (tensor, pipeline, stage) == (1, 1, 0) else 2
    found = worlds.run(
        size, moments_that_are_zero, layout(tree, tensor, pipeline, stage, precision)
    )
    assert found == [[]] * size
