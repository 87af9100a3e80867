"""Compare the model with golden files of the reference implementation.

    python tests/golden.py FILE [FILE ...] [--tensor-parallel 2]

Prints a line for each file: the largest difference of the logits, and if it exceeds the bound the
first activation that differs; or why the file cannot be read. Exits with 1 if any file exceeds the
bound or cannot be read.
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
    """The contents of a file: weights under our names, ids (B, L) already shifted."""

    model: ModelConfig
    weights: dict[str, Float32Array]
    ids: torch.Tensor
    logits: Float32Array
    activations: dict[str, Float32Array]


def read_golden(path: Path, tensor: int = 1) -> Golden:
    """Read a file for `tensor` ranks. Raises CheckpointError naming the invalid entry."""
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
    converted = reference_weights(weights, model)
    return Golden(model, converted, ids, logits, strip_prefix(entries, "act/"))


def load_model(golden: Golden, layers: PlainLayers | None = None) -> Hourglass:
    """Return the model of a golden file with its weights, or this rank's slices of them."""
    hourglass = Hourglass(golden.model, layers, seed=None)
    parameters = dict(hourglass.named_parameters())
    assert parameters.keys() == golden.weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            weight = torch.from_numpy(np.ascontiguousarray(golden.weights[name], np.float32))
            parameter.copy_(shard_of(parameter).slice_of(weight))
    return hourglass


def differences(path: Path, layers: PlainLayers | None = None) -> tuple[float, str]:
    """Return the largest difference of the logits, and a text on the activations.

    Raises CheckpointError if the file does not have the format.
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
    errors = {
        name: _difference(f"act/{name}", value, golden.activations[name])
        for name, value in seen.items()
        if name in golden.activations
    }
    return worst, _first_difference(errors, failed=not worst <= BOUND)


def _difference(name: str, computed: torch.Tensor, golden: Float32Array) -> float:
    if computed.shape != golden.shape or golden.dtype.kind not in "fiu":
        expected = f"numbers {tuple(computed.shape)}"
        raise CheckpointError(f"{name}: expected {expected}, got {describe_array(golden)}")
    return float(np.abs(computed.numpy() - golden).max())


def _first_difference(errors: dict[str, float], failed: bool) -> str:
    """Name the first activation that differs, in the order of the forward pass; "" if none does.

    If the logits are equal, activations may differ by twice the bound, since rounding changes them
    more than logits.
    """
    bound = BOUND if failed else 2 * BOUND
    for name, difference in errors.items():
        if not difference <= bound:
            return f"first activation that differs: {name} by {difference:.2e}"
    if failed:
        return "no activation differs" if errors else "no activation in the file"
    return ""


def _upsampled(layer, state: Activations, context: Context, level: int) -> dict[str, torch.Tensor]:
    """Return the output of an Upsample before its norm, as in the golden files."""
    captured = []
    handle = layer.norm.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    layer(state, context)
    handle.remove()
    return {f"level{level}/upsample": captured[0]}


def _activation(name: str) -> str:
    """Return the golden files' name for the output of a layer."""
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
    """Print a line for each file; return how many exceed the bound or lack the format."""
    failed = 0
    for path in paths:
        try:
            worst, first = differences(path, layers)
        except UserError as error:
            ok, line = False, str(error)
        else:
            ok = worst <= BOUND
            verdict = "ok" if ok else f"EXCEEDS THE BOUND {BOUND:.0e}"
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
