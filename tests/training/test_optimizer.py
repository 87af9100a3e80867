"""Parameter groups, and one update of every group against Adam's formula."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from hg_scale.config.load import parse_config
from hg_scale.config.read import merge
from hg_scale.model.hourglass import Hourglass
from hg_scale.training.optimizer import make_optimizer, parameter_groups, set_learning_rate
from tests.training.models import BY_LEVEL

TREE = merge(BY_LEVEL, {"optimizer": {"weight_decay": 0.1}, "model": {"bias": True}})


def test_matrices_decay_and_vectors_do_not() -> None:
    """Also where vectors are stored as matrices: scales and position biases per head."""
    tree = merge(TREE, {"model": {"positions": "relative", "window": None}})
    config = parse_config(tree)
    named = list(Hourglass(config.model).named_parameters())
    decays = {
        id(parameter): group["weight_decay"]
        for group in parameter_groups(config, named)
        for parameter in group["params"]
    }
    assert len(decays) == len(named)
    vectors = (".bias", "norm.weight", ".gain", ".q_scale", ".k_scale", ".u", ".v")
    found = {suffix: 0 for suffix in vectors}
    for name, parameter in named:
        suffix = next((suffix for suffix in vectors if name.endswith(suffix)), None)
        if suffix:
            found[suffix] += 1
        assert decays[id(parameter)] == (0.0 if suffix else 0.1), name
    assert all(found.values())


def level_of(name: str) -> int:
    """Return the level of a parameter; resampling belongs to the outer of its two."""
    if not (match := re.match(r"level(\d)\.", name)):
        return 0
    return int(match[1]) + (".shorten." not in name and ".upsample." not in name)


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_an_update_of_every_parameter_is_adams(kind: str) -> None:
    """Two updates, with betas, eps, decay and learning rate unlike the defaults."""
    keys: dict[str, Any] = {"name": kind, "betas": [0.7, 0.95], "eps": 1e-2,
                            "learning_rate_by_level": [1.0, 0.8, 0.5]}  # fmt: skip
    if kind == "adam":
        keys["weight_decay"] = 0.0
    config = parse_config(merge(TREE, {"optimizer": keys}))
    named = list(Hourglass(config.model).named_parameters())
    optimizer = make_optimizer(config, named)
    before = {name: parameter.detach().clone().double() for name, parameter in named}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in before.items()}
    for step, rate in ((1, 0.02), (2, 0.05)):
        set_learning_rate(optimizer, rate)
        for number, (name, parameter) in enumerate(named):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = 0.1 * torch.randn(parameter.shape, generator=generator)
            gradient, (m, v) = parameter.grad.double(), moments[name]
            m.mul_(0.7).add_(gradient, alpha=0.3)
            v.mul_(0.95).add_(gradient.square(), alpha=0.05)
            lr = rate * [1.0, 0.8, 0.5][level_of(name)]
            decays = name.endswith(".weight") and parameter.dim() == 2 and kind == "adamw"
            corrected = m / (1 - 0.7**step), v / (1 - 0.95**step)
            before[name] *= 1 - lr * (0.1 if decays else 0.0)
            before[name] -= lr * corrected[0] / (corrected[1].sqrt() + 1e-2)
        optimizer.step()
    for name, parameter in named:
        torch.testing.assert_close(
            parameter.detach().double(), before[name], rtol=1e-4, atol=1e-6, msg=name
        )
