"""Write DeepSpeed's universal format, as `deepspeed.checkpoint.ds_to_universal` does.

    latest_universal                    the name of the folder below
    global_stepN/zero/NAME/fp32.pt      {"param": unsharded tensor, "cat_dim": ...}; likewise
                                        exp_avg.pt, exp_avg_sq.pt; step.pt is the step count
    global_stepN/zero/optimizer_state.pt
    global_stepN/*_model_states.pt      counters; one file for ZeRO 1 and 2, one for ZeRO 3

`cat_dim` is the dimension that tensor parallelism shards. A DeepSpeed engine around a model with
the same parameter names loads the folder with `{"checkpoint": {"load_universal": true}}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from hg_scale.checkpoint.fragments import KINDS
from hg_scale.checkpoint.jobs import ProgressReporter, run_jobs
from hg_scale.config.schema import ModelConfig
from hg_scale.convert.checkpoint_source import CheckpointSource
from hg_scale.convert.deepspeed_files import EXTRA_STATE, LATEST_UNIVERSAL, ZERO_FOLDER
from hg_scale.convert.output import new_folder
from hg_scale.convert.source import require_usable
from hg_scale.model.hourglass import Hourglass
from hg_scale.model.layers import PlainLayers
from hg_scale.model.sharding import TensorShard, mark_shard, shard_of

DEEPSPEED_VERSION = "0.19.8"  # this follows its converter
UNIVERSAL_VERSION = 0.4
_PARAM_GROUPS = 1024  # more than any optimizer here has


class _ShardedLayers(PlainLayers):
    """Plain layers whose parameters are marked with the dimension that Megatron shards."""

    def column(self, d_in: int, d_out: int, bias: bool) -> nn.Module:
        layer = super().column(d_in, d_out, bias)
        for parameter in layer.parameters():
            mark_shard(parameter, TensorShard(0))
        return layer

    def row(self, d_in: int, d_out: int, bias: bool) -> nn.Module:
        layer = nn.Linear(d_in, d_out, bias)
        mark_shard(cast(nn.Parameter, layer.weight), TensorShard(1))
        return layer

    def projection(self, d_in: int, d_out: int, bias: bool) -> nn.Module:
        return self.row(d_in, d_out, bias)

    def embedding(self, vocab: int, d: int) -> nn.Module:
        layer = nn.Embedding(vocab, d)
        mark_shard(cast(nn.Parameter, layer.weight), TensorShard(0))
        return layer

    def by_head(self, heads: int, d_head: int, value: float) -> nn.Parameter:
        return mark_shard(super().by_head(heads, d_head, value), TensorShard(0))


def tensor_parallel_dims(model: ModelConfig) -> dict[str, int | None]:
    """Return the dimension along which tensor parallelism shards each parameter, or None."""
    with torch.device("meta"):
        hourglass = Hourglass(model, _ShardedLayers(), seed=None)
    return {name: shard_of(p).dim for name, p in hourglass.named_parameters()}


@dataclass(frozen=True)
class WriteParameter:
    """Job: write the files of one parameter; return the number of bytes."""

    source: CheckpointSource
    folder: Path
    dims: dict[str, int | None]
    allow_non_finite: bool = False

    def __call__(self, name: str) -> int:
        folder = self.folder / name
        folder.mkdir(parents=True)
        cat_dim = {} if self.dims[name] is None else {"cat_dim": self.dims[name]}
        for kind in KINDS:  # DeepSpeed needs the moments even if they are zeros
            values = self.source.full_tensor(name, kind)
            if not self.allow_non_finite:
                require_usable(self.source, name, kind, values)
            state = {"param": values, **cat_dim}
            torch.save(state, folder / f"{kind}.pt")
        torch.save(torch.tensor(float(self.source.optimizer_step)), folder / "step.pt")
        return 4 * len(KINDS) * prod(self.source.shapes[name])


def to_deepspeed(
    source: CheckpointSource,
    out: Path,
    *,
    workers: int = 1,
    report: ProgressReporter,
    allow_non_finite: bool = False,
) -> None:
    """Write the new folder `out`. Raises CheckpointError, also if the source is corrupt.

    Elements that are not finite are refused, unless `allow_non_finite`.
    """
    source.require_unchanged(workers, report)
    tag = f"global_step{source.step}"
    with new_folder(out) as folder:
        zero = folder / tag / ZERO_FOLDER
        zero.mkdir(parents=True)
        write = WriteParameter(source, zero, tensor_parallel_dims(source.model), allow_non_finite)
        report.begin("writing DeepSpeed's files", 4 * len(KINDS) * source.parameters)
        for _, written in run_jobs(write, list(source.shapes), workers):
            report.advance(written)
        torch.save(_optimizer_state(source), zero / "optimizer_state.pt")
        for name in ("mp_rank_00", "zero_pp_rank_0_mp_rank_00"):
            torch.save(_model_states(source), folder / tag / f"{name}_model_states.pt")
        (folder / LATEST_UNIVERSAL).write_text(tag, encoding="utf-8")


def _optimizer_state(source: CheckpointSource) -> dict[str, Any]:
    """Return an optimizer state that overwrites none of the loading engine's settings.

    DeepSpeed zips these parameter groups with its own and copies every key. Empty groups leave the
    learning rates and weight decays as configured; there must be at least as many as it has.
    """
    step = torch.tensor(float(source.optimizer_step))
    return {
        "ds_version": DEEPSPEED_VERSION,
        "param_groups": [{} for _ in range(_PARAM_GROUPS)],
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [{}]},  # ZeRO 3
    }


def _model_states(source: CheckpointSource) -> dict[str, Any]:
    progress = source.progress or {}
    return {
        "module": None,
        "global_steps": source.step,
        "global_samples": 0,
        "skipped_steps": progress.get("skipped", 0),
        "dp_world_size": 1,
        "mp_world_size": 1,
        "lr_scheduler": None,
        "ds_version": DEEPSPEED_VERSION,
        "universal_checkpoint_info": {"universal_checkpoint_version": UNIVERSAL_VERSION},
        EXTRA_STATE: {
            "model": source.model.model_dump(),
            "config": source.config,
            "progress": progress,
            "tokenizer": source.tokenizer,
        },
    }
