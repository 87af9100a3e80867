"""Parameter groups and torch's own Adam, handed to DeepSpeed.

DeepSpeed's default optimizer compiles an extension on every node, which fails without nvcc and
hangs on shared home directories; torch's fused one needs nothing.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from hg_scale.config.schema import Config, by_level
from hg_scale.errors import UserError
from hg_scale.model.plan import layer_plan

Named = list[tuple[str, nn.Parameter]]


def parameter_groups(config: Config, named: Named) -> list[dict[str, Any]]:
    """Groups by learning-rate factor and decay: matrices decay, vectors do not.

    `lr_scale` is the factor of a parameter's level; the layers that join two levels, the embedding
    and the head belong to the outer one.

    Every rank gets the same number of groups, whatever its pipeline stage holds, by halving large
    ones: DeepSpeed adds up the gradient norm group by group over all stages, and would wait
    forever for a group that a stage lacks.
    """
    level_of = {layer.name: layer.level for layer in layer_plan(config.model)}
    factors = by_level(config.optimizer.learning_rate_by_level, config.model.parsed.level_count)
    decay = config.optimizer.weight_decay
    members: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        level = next((s for prefix, s in level_of.items() if name.startswith(prefix + ".")), 0)
        # By-head scales and biases are vectors, though stored as (heads, d_head).
        matrix = name.endswith(".weight") and parameter.dim() == 2
        members[factors[level], decay if matrix else 0.0].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr_scale": factor, "weight_decay": weight_decay}
        for (factor, weight_decay), parameters in sorted(members.items(), key=lambda item: item[0])
    ]
    wanted = len({(factor, d) for factor in factors for d in (decay, 0.0)})
    while len(groups) < wanted:
        largest = max(groups, key=lambda group: len(group["params"]))
        parameters = largest["params"]
        if len(parameters) < 2:
            raise UserError(
                f"a pipeline stage holds {len(named)} parameters, fewer than the {wanted} groups "
                "of the optimizer (learning rates by level x decay); use fewer parallel.pipeline"
            )
        half = len(parameters) // 2
        largest["params"] = parameters[:half]
        groups.append({**largest, "params": parameters[half:]})
    return groups


def make_optimizer(config: Config, named: Named) -> torch.optim.Optimizer:
    """Fused AdamW, or the paper's Adam."""
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
    """The step's rate in every group, times the factor of its level."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
