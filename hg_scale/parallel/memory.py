"""Memory of weights, gradients and optimizer states of a rank, in closed form, without torch.

Bytes per parameter as DeepSpeed 0.19 allocates them: weights, gradients, and Adam's master copy and
two moments, each replicated or sharded over the data-parallel ranks by the ZeRO stage. Activations,
communication buffers and the allocator's fragmentation are not included.
"""

from __future__ import annotations

from itertools import pairwise

from hg_scale.config.schema import Config
from hg_scale.model.costs import layer_costs
from hg_scale.parallel.pipeline_cut import cut_pipeline


def rank_parameters(config: Config) -> int:
    """Return the parameters per rank of the largest pipeline stage.

    All are counted as divided by tensor parallelism; the norms, which are not, are few.
    """
    costs, stages = layer_costs(config.model), config.parallel.pipeline
    cut = cut_pipeline(config.model, stages).parts if stages > 1 else [0, len(costs)]
    unsharded = max(sum(cost.parameters for cost in costs[a:b]) for a, b in pairwise(cut))
    return -(-unsharded // config.parallel.tensor)


def state_bytes(config: Config, world_size: int) -> int:
    """Return a lower bound of the bytes of weights, gradients and optimizer states per rank."""
    bf16, stage = config.training.precision == "bf16", config.parallel.zero_stage
    ranks = config.data_parallel(world_size)
    weights = 2 if bf16 else 4
    # bf16: gradients accumulate in fp32; stage 1 also holds those of one micro-batch in bf16.
    gradients = 4 + (2 if bf16 and stage == 1 else 0)
    moments = 8
    master = 4 if stage else 0  # ZeRO keeps master weights even in fp32
    replicated, sharded = 0, 0
    for size, first_stage in ((weights, 3), (gradients, 2), (master + moments, 1)):
        if stage >= first_stage:
            sharded += size
        else:
            replicated += size
    parameters = rank_parameters(config)
    return replicated * parameters + -(-sharded * parameters // ranks)
