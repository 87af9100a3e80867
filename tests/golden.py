"""Compare the model with golden files of the reference implementation.

    python tests/golden.py FILE [FILE ...] [--tensor-parallel 2]

Prints the largest difference of the logits of each file and, where one is past the bound, the first
activation that differs; a line, too, for what is no file of this format. Exits 1 when any file is
past the bound or cannot be read.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.config.schema import ModelConfig
from hg_scale.convert.reference import (
    Float32Array,
    describe_array,
    read_golden_arrays,
    reference_config,
    reference_weights,
    strip_prefix,
)
from hg_scale.errors import UserError
from hg_scale.model.block import Activations
from hg_scale.model.context import Context
from hg_scale.model.hourglass import Hourglass
from hg_scale.model.layers import PlainLayers
from hg_scale.model.plan import layer_plan
from hg_scale.model.sharding import shard_of

BOUND = 1e-5  # absolute, on logits in float32


@dataclass(frozen=True)
class Golden:
    """What is in a file; weights under our names, ids (B, L) shifted already."""

    model: ModelConfig
    weights: dict[str, Float32Array]
    ids: torch.Tensor
    logits: Float32Array
    activations: dict[str, Float32Array]


def read_golden(path: Path, tensor: int = 1) -> Golden:
    """Read a file, for a model in `tensor` slices. Raises CheckpointError naming what is amiss."""
    entries = read_golden_arrays(path, "config", "input/tokens_shifted", "output/logits")
    model = reference_config(str(entries["config"]), tensor)
    weights = strip_prefix(entries, "weight/")
    ids, logits = entries["input/tokens_shifted"], entries["output/logits"]
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise CheckpointError(
            f"input/tokens_shifted: expected ids (B, L), got {describe_array(ids)}"
        )
    if ids.min() < 0 or ids.max() >= model.vocab_size:
        raise CheckpointError(
            f"input/tokens_shifted: expected ids from 0 to {model.vocab_size - 1}"
        )
    if logits.shape != (*ids.shape, model.vocab_size):
        expected = (*ids.shape, model.vocab_size)
        raise CheckpointError(f"output/logits: expected {expected}, got {describe_array(logits)}")
    ids = torch.from_numpy(ids.astype(np.int64))
    ours = reference_weights(weights, model)
    return Golden(model, ours, ids, logits, strip_prefix(entries, "act/"))


def load_model(golden: Golden, layers: PlainLayers | None = None) -> Hourglass:
    """The model of a golden file with its weights (this rank's slices of them)."""
    hourglass = Hourglass(golden.model, layers)
    parameters = dict(hourglass.named_parameters())
    assert parameters.keys() == golden.weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            whole = torch.from_numpy(np.ascontiguousarray(golden.weights[name], np.float32))
            parameter.copy_(shard_of(parameter).take(whole))
    return hourglass


def differences(path: Path, layers: PlainLayers | None = None) -> tuple[float, str]:
    """Largest difference of the logits, and the first activation that is off, in words.

    Raises CheckpointError where the file is not of the format.
    """
    golden = read_golden(path, layers.size if layers else 1)
    hourglass = load_model(golden, layers)
    model, seen = hourglass.config, {}
    state, context = Activations(golden.ids), Context(golden.model.parsed.factors)
    with torch.no_grad():
        for plan, layer in zip(layer_plan(model), hourglass.sequence, strict=True):
            if plan.kind == "upsample":
                seen |= _upsampled(layer, state, context, plan.level)
            state = layer(state, context)
            seen[_activation(plan.name)] = state.x
    logits = _gather(state.x, hourglass.parts)[..., : model.vocab_size]
    worst = _difference("output/logits", logits, golden.logits)
    off = {
        name: _difference(f"act/{name}", value, golden.activations[name])
        for name, value in seen.items()
        if name in golden.activations
    }
    return worst, _first_off(off, failed=not worst <= BOUND)


def _difference(name: str, ours: torch.Tensor, theirs: Float32Array) -> float:
    if ours.shape != theirs.shape or theirs.dtype.kind not in "fiu":
        expected = f"numbers {tuple(ours.shape)}"
        raise CheckpointError(f"{name}: expected {expected}, got {describe_array(theirs)}")
    return float(np.abs(ours.numpy() - theirs).max())


def _first_off(off: dict[str, float], failed: bool) -> str:
    """The first activation that differs, in the order of the forward pass; "" where none does.

    Where the logits are right it counts from twice the bound: rounding moves an activation by more
    than a logit.
    """
    bound = BOUND if failed else 2 * BOUND
    for name, difference in off.items():
        if not difference <= bound:
            return f"first activation off: {name} by {difference:.2e}"
    if failed:
        return "no activation off" if off else "no activation in the file"
    return ""


def _upsampled(layer, state: Activations, context: Context, level: int) -> dict[str, torch.Tensor]:
    """The output of an Upsample before its norm, which the golden files hold."""
    caught = []
    handle = layer.norm.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    layer(state, context)
    handle.remove()
    return {f"level{level}/upsample": caught[0]}


def _activation(name: str) -> str:
    """The golden files' name of what a layer of ours returns."""
    name = name.replace(".", "/")
    if name.endswith("/upsample"):
        return name.removesuffix("upsample") + "out"
    return {"embedding": "embed"}.get(name, name.removesuffix("/norm"))


def _gather(logits: torch.Tensor, layers: PlainLayers) -> torch.Tensor:
    if layers.size == 1:
        return logits
    parts = [torch.empty_like(logits) for _ in range(layers.size)]
    dist.all_gather(parts, logits.contiguous())
    return torch.cat(parts, -1)


def compare(paths: list[Path], layers: PlainLayers | None = None, report: bool = True) -> int:
    """Print a line a file; the number of files past the bound, or not of the format."""
    failed = 0
    for path in paths:
        try:
            worst, first = differences(path, layers)
        except UserError as error:
            ok, line = False, str(error)
        else:
            ok = worst <= BOUND
            verdict = "ok" if ok else f"PAST THE BOUND {BOUND:.0e}"
            line = f"largest difference of the logits {worst:.2e}  {verdict}  {first}".rstrip()
        failed += not ok
        if report:
            print(f"{path}: {line}", flush=True)
    return failed


def _worker(rank: int, size: int, port: int, paths: list[Path], failures: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    from hg_scale.parallel import megatron

    megatron.initialize_groups(size, 1)
    failed = compare(paths, megatron.MegatronLayers(), report=rank == 0)
    if rank == 0:
        failures.put(failed)
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tensor-parallel", type=_size, default=1, metavar="N")
    arguments = parser.parse_args()
    if arguments.tensor_parallel == 1:
        return 1 if compare(arguments.files) else 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size, failures = arguments.tensor_parallel, mp.get_context("spawn").SimpleQueue()
    mp.spawn(_worker, (size, port, arguments.files, failures), size)
    return 1 if failures.get() else 0


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of processes, got '{text}'")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
