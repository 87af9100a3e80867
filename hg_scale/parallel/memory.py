"""Memory of what a rank keeps from step to step, in closed form, without torch.

Bytes a parameter, as DeepSpeed 0.19 lays them out: weights, gradients, and Adam's master copy and
two moments, each whole or shared out over the data-parallel ranks by the ZeRO stage. Activations,
communication buffers and the allocator's slack come on top.
"""

from __future__ import annotations

from itertools import pairwise

from hg_scale.config.schema import Config
from hg_scale.model.costs import layer_costs
from hg_scale.parallel.stages import cut_pipeline


def rank_parameters(config: Config) -> int:
    """Parameters of the fullest pipeline stage's rank.

    Tensor parallelism is taken to divide all of them; norms, which it does not, are few.
    """
    costs, stages = layer_costs(config.model), config.parallel.pipeline
    cut = cut_pipeline(config.model, stages).parts if stages > 1 else [0, len(costs)]
    whole = max(sum(cost.parameters for cost in costs[a:b]) for a, b in pairwise(cut))
    return -(-whole // config.parallel.tensor)


def state_bytes(config: Config, world_size: int) -> int:
    """Bytes of weights, gradients and optimizer states on the fullest rank, at the least."""
    bf16, stage = config.training.precision == "bf16", config.parallel.zero_stage
    ranks = config.data_parallel(world_size)
    weights = 2 if bf16 else 4
    # bf16: the fp32 sum of the micro-batches; stage 1 also holds one micro-batch's in bf16.
    gradients = 4 + (2 if bf16 and stage == 1 else 0)
    moments = 8
    master = 4 if stage else 0  # ZeRO keeps one in fp32 too
    whole, shared = 0, 0
    for size, first_stage in ((weights, 3), (gradients, 2), (master + moments, 1)):
        if stage >= first_stage:
            shared += size
        else:
            whole += size
    parameters = rank_parameters(config)
    return whole * parameters + -(-shared * parameters // ranks)
