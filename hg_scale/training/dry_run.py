"""The plan of a run (`train.py --dry-run`): configuration, layers with costs, pipeline cut.

Needs neither torch nor a process group.
"""

from __future__ import annotations

from itertools import pairwise

from rich.console import Console
from rich.table import Table

from hg_scale.config.schema import Config
from hg_scale.model.costs import layer_costs, parameter_count, training_flops_per_token
from hg_scale.model.layer_table import layer_table
from hg_scale.parallel.memory import state_bytes
from hg_scale.parallel.pipeline_cut import cut_pipeline


def print_plan(config: Config, world_size: int, console: Console) -> None:
    """Print the plan of a run of `world_size` processes."""
    console.print_json(config.model_dump_json(exclude_none=True))
    console.print(_layers(config))
    total, model = parameter_count(config.model), config.model
    tokens = config.training.global_batch_size * model.sequence_length
    per_token = training_flops_per_token(model)
    console.print(f"parameters: {total:,}")
    console.print(f"training FLOPs: {per_token:,.0f} per token, {per_token * tokens:.3g} per step")
    console.print(
        f"tokens: {tokens:,} per step, {tokens * config.training.steps:.3g} in "
        f"{config.training.steps:,} steps"
    )
    parallel = config.parallel
    console.print(
        f"layout: {world_size} processes = tensor {parallel.tensor} x pipeline "
        f"{parallel.pipeline} x data {config.data_parallel(world_size)}, ZeRO "
        f"{parallel.zero_stage}; micro-batches per step: {config.micro_batches(world_size)}"
    )
    console.print(
        f"memory per process: at least {state_bytes(config, world_size) / 2**30:,.1f} GiB for "
        "weights, gradients and optimizer states, plus activations"
    )
    if parallel.pipeline > 1:
        _print_cut(config, world_size, console)


def _layers(config: Config) -> Table:
    """One row per layer; consecutive equal blocks share a row."""
    model, element = config.model, 2 if config.training.precision == "bf16" else 4
    table = Table(title=f"layers of '{model.hierarchy}', one sequence: forward FLOPs, MiB of cache")
    for column in ("layer", "kind", "positions", "width"):
        table.add_column(column)
    for column in ("parameters", "GFLOPs", "share", "cache"):
        table.add_column(column, justify="right")
    table.add_column("tensor split")
    for row in layer_table(model):
        table.add_row(
            row.name,
            row.kind,
            f"{row.positions:,}",
            f"{row.width:,}",
            f"{row.parameters:,}",
            f"{row.flops / 1e9:,.2f}",
            f"{row.share:.1%}",
            f"{row.cache * element / 2**20:,.1f}",
            row.split,
        )
    return table


def _print_cut(config: Config, world_size: int, console: Console) -> None:
    cut = cut_pipeline(config.model, config.parallel.pipeline)
    costs = layer_costs(config.model)
    table = Table(title="pipeline stages: training FLOPs of one sequence")
    for column in ("stage", "layers"):
        table.add_column(column)
    for column in ("GFLOPs", "share", "elements in"):
        table.add_column(column, justify="right")
    for stage, (a, b) in enumerate(pairwise(cut.parts)):
        table.add_row(
            str(stage),
            f"{costs[a].layer.name} .. {costs[b - 1].layer.name}",
            f"{cut.flops[stage] / 1e9:,.2f}",
            f"{cut.flops[stage] / sum(cut.flops):.1%}",
            f"{cut.traffic[stage]:,}",
        )
    console.print(table)
    micro_batches = config.micro_batches(world_size)
    console.print(
        f"expected imbalance: {cut.imbalance:.3f} (slowest stage / mean, with communication); "
        f"bubble: {cut.bubble(micro_batches):.1%} with {micro_batches} micro-batches"
    )
