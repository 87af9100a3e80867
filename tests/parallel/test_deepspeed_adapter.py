"""The contract with DeepSpeed: the private state that the adapter uses still exists.

When one of these fails after an update, DeepSpeed has moved that attribute:
`parallel/deepspeed_adapter.py` is the file to fix. Where gradients are kept is tested by
`tests/training/test_skipped_steps.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.training.models import PAPER, layout
from tests.world import Worlds

ENGINES = {
    # (tensor, pipeline, ZeRO stage, precision): the optimizer that DeepSpeed chooses
    (1, 1, 0, "fp32"): "AdamW",
    (1, 1, 1, "fp32"): "DeepSpeedZeroOptimizer",
    (1, 1, 2, "bf16"): "DeepSpeedZeroOptimizer",
    (1, 1, 3, "bf16"): "DeepSpeedZeroOptimizer_Stage3",
    (1, 1, 1, "bf16"): "BF16_Optimizer",
    (1, 2, 1, "fp32"): "DeepSpeedZeroOptimizer",
    (1, 2, 1, "bf16"): "BF16_Optimizer",
    (1, 2, 0, "fp32"): "AdamW",
}


def engine_of(tree: dict[str, Any]) -> Any:
    import deepspeed

    from hg_scale.config.load import parse_config
    from hg_scale.parallel.mesh import make_mesh
    from hg_scale.training.engine import make_engine

    deepspeed.init_distributed()
    config = parse_config(tree, world_size=dist.get_world_size())
    mesh, parts = make_mesh(config.parallel)
    return make_engine(config, mesh, parts, torch.device("cpu"))


def check_contract(tree: dict[str, Any], stage: int) -> dict[str, Any]:
    """The optimizer's class, the missing attributes, and how much the fragments cover."""
    from hg_scale.checkpoint.local_state import local_states, optimizer_step
    from hg_scale.parallel.deepspeed_adapter import StageModule

    engine = engine_of(tree)
    deep = engine.deepspeed
    missing = []

    def need(owner: Any, path: str) -> Any:
        for name in path.split("."):
            if not hasattr(owner, name):
                missing.append(f"{type(owner).__name__}.{name}")
                return None
            owner = getattr(owner, name)
        return owner

    # What the adapter and training/engine.py call, set or override.
    for name in (
        "skipped_steps",
        "get_global_grad_norm",
        "clip_fp32_gradients",
        "_take_model_step",
    ):
        need(deep, name)
    if hasattr(deep, "train_batch"):
        need(deep, "reset_activation_shape")
        need(deep, "_aggregate_total_loss")
        for name in ("slice_group", "dp_group", "pp_group", "get_pipe_parallel_group"):
            need(deep.module, f"_grid.{name}")
        overridden = ("_partition_layers", "_build", "get_tied_weights_and_groups")
        for name in ("_set_bounds", "_local_start", "_local_stop", "forward_funcs"):
            need(deep.module, name)
        for name in overridden:
            need(StageModule.__base__, name)
    else:
        need(deep, "data_parallel_group")
    need(deep, "basic_optimizer.param_groups")
    need(deep, "basic_optimizer.state")
    for parameter in engine.slices:
        if stage == 3:
            need(parameter, "ds_tensor")
            need(parameter, "ds_process_group")
            for name in ("grad_position", "get_param_id", "fp32_partitioned_groups_flat"):
                need(deep.optimizer, name)
        elif stage > 0 and need(parameter, "_hp_mapping") is not None:
            for name in ("param_group_index", "hp_fragment_address.start"):
                need(parameter, f"_hp_mapping.{name}")
            for name in ("start", "numel"):
                need(parameter, f"_hp_mapping.lp_fragment_address.{name}")
    covered = 0
    for local in [] if missing else local_states(deep, engine.slices):
        covered += local.fragment.length
        for kind, tensor in local.tensors.items():
            if (tensor.dtype, tensor.shape) != (torch.float32, (local.fragment.length,)):
                missing.append(f"{kind}: flat fp32 of {local.fragment.length}")
            if kind == "fp32" and not bool(tensor.isfinite().all()):
                missing.append(f"{local.fragment.slice.name}: finite masters")
    return {
        "optimizer": type(deep.optimizer).__name__,
        "missing": missing,
        "covered": covered,
        "step": optimizer_step(deep),
    }


@pytest.mark.parametrize(("tensor", "pipeline", "stage", "precision"), ENGINES)
def test_private_state_of_deepspeed_exists(
    worlds: Worlds, tensor: int, pipeline: int, stage: int, precision: str
) -> None:
    tree = layout(PAPER, tensor, pipeline, stage, precision)
    tree["optimizer"] = {**tree["optimizer"], "name": "adamw"}
    found = worlds.run(2, check_contract, tree, stage)
    assert [rank["missing"] for rank in found] == [[], []]
    chosen = ENGINES[tensor, pipeline, stage, precision]
    assert {rank["optimizer"] for rank in found} == {chosen}
    assert {rank["step"] for rank in found} == {0}
    assert all(rank["covered"] for rank in found)
    if stage > 0 and pipeline == 1:  # the two data-parallel ranks share the work evenly
        assert abs(found[0]["covered"] - found[1]["covered"]) < 100
