"""Parameter groups and the optimizer under DeepSpeed: torch's fused Adam or AdamW.

DeepSpeed's own Adam compiles an extension on every node, which fails without nvcc and hangs on
shared home directories.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from hg_scale.config.schema import Config, ModelConfig, by_level
from hg_scale.errors import UserError
from hg_scale.model.plan import layer_plan

NamedParameters = list[tuple[str, nn.Parameter]]


def parameter_groups(config: Config, named: NamedParameters) -> list[dict[str, Any]]:
    """Group parameters by learning-rate factor and weight decay: matrices decay, vectors do not.

    `lr_scale` is the factor of a parameter's level; pooling and upsampling layers, the embedding
    and the head belong to the outer level.

    Every pipeline stage gets the same number of groups, by halving large ones: DeepSpeed reduces
    the gradient norm group by group over all stages, and would wait forever for a group that a
    stage lacks. Raises UserError if a stage has too few parameters for that.
    """
    factors = by_level(config.optimizer.learning_rate_by_level, config.model.parsed.level_count)
    decay = config.optimizer.weight_decay
    members: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        level = level_of_parameter(config.model, name)
        # Scales and biases per head are vectors, though stored as (heads, d_head).
        matrix = name.endswith(".weight") and parameter.dim() == 2
        members[factors[level], decay if matrix else 0.0].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr_scale": factor, "weight_decay": weight_decay}
        for (factor, weight_decay), parameters in sorted(members.items(), key=lambda item: item[0])
    ]
    group_count = len({(factor, d) for factor in factors for d in (decay, 0.0)})
    while len(groups) < group_count:
        largest = max(groups, key=lambda group: len(group["params"]))
        parameters = largest["params"]
        if len(parameters) < 2:
            raise UserError(
                f"a pipeline stage holds {len(named)} parameters, fewer than the {group_count} "
                "parameter groups (learning rates by level x weight decay); use fewer stages "
                "(parallel.pipeline)"
            )
        half = len(parameters) // 2
        largest["params"] = parameters[:half]
        groups.append({**largest, "params": parameters[half:]})
    return groups


def level_of_parameter(model: ModelConfig, name: str) -> int:
    """Return the level of a parameter; those outside of all layers belong to the outer level."""
    layers = layer_plan(model)
    return next((layer.level for layer in layers if name.startswith(layer.name + ".")), 0)


def make_optimizer(config: Config, named: NamedParameters) -> torch.optim.Optimizer:
    """Make a fused AdamW, or Adam as in the paper."""
    kind = torch.optim.AdamW if config.optimizer.name == "adamw" else torch.optim.Adam
    first, second = config.optimizer.betas
    return kind(
        parameter_groups(config, named),
        lr=config.optimizer.learning_rate,
        betas=(first, second),
        eps=config.optimizer.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group to `rate` times the factor of its level."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
