"""Compare the model with golden files of the reference implementation.

    python tests/golden.py FILE [FILE ...] [--tensor-parallel 2]

Prints the largest difference of the logits of each file and, past the bound, the first activation
that differs. Exits 1 when any file is past the bound.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hg_scale.checkpoint.reference import reference_config, reference_weights
from hg_scale.model.block import State
from hg_scale.model.context import Context
from hg_scale.model.hourglass import Hourglass
from hg_scale.model.layers import PlainLayers
from hg_scale.model.plan import layer_plan
from hg_scale.parallel.sharding import shard_of

BOUND = 1e-5  # absolute, on logits in float32


def load_model(file: np.lib.npyio.NpzFile, layers: PlainLayers | None = None) -> Hourglass:
    """The model of a golden file with its weights (this rank's slices of them)."""
    model = reference_config(str(file["config"]))
    hourglass = Hourglass(model, layers)
    theirs = {k.removeprefix("weight/"): file[k] for k in file.files if k.startswith("weight/")}
    ours = reference_weights(theirs, model)
    parameters = dict(hourglass.named_parameters())
    missing, unused = parameters.keys() - ours.keys(), ours.keys() - parameters.keys()
    if missing or unused:
        raise SystemExit(f"weights do not fit: missing {missing}, unused {unused}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            whole = torch.from_numpy(np.ascontiguousarray(ours[name]))
            parameter.copy_(shard_of(parameter).take(whole))
    return hourglass


def differences(path: Path, layers: PlainLayers | None = None) -> tuple[float, str]:
    """Largest difference of the logits, and the first activation past the bound in words."""
    file = np.load(path, allow_pickle=False)
    hourglass = load_model(file, layers)
    model, seen = hourglass.config, {}
    state = State(torch.from_numpy(file["input/tokens_shifted"]).long())
    context = Context(model.parsed.factors)
    with torch.no_grad():
        for plan, layer in zip(layer_plan(model), hourglass._sequence, strict=True):
            if plan.kind == "upsample":
                seen |= _upsampled(layer, state, context, plan.level)
            state = layer(state, context)
            seen[_activation(plan.name)] = state.x
    logits = _gather(state.x, hourglass.parts)[..., : model.vocab_size]
    worst = np.abs(logits.numpy() - file["output/logits"]).max()
    first = ""
    for name, value in seen.items():
        key = f"act/{name}"
        if key in file.files:
            difference = np.abs(value.numpy() - file[key]).max()
            if not difference <= 2 * BOUND:
                first = f"first activation off: {name} by {difference:.2e}"
                break
    return float(worst), first


def _upsampled(layer, state: State, context: Context, level: int) -> dict[str, torch.Tensor]:
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
    """Print a line a file; the number of files past the bound."""
    failed = 0
    for path in paths:
        worst, first = differences(path, layers)
        ok = worst <= BOUND
        failed += not ok
        if report:
            verdict = "ok" if ok else f"PAST THE BOUND {BOUND:.0e}"
            print(f"{path.name}: largest difference of the logits {worst:.2e}  {verdict}  {first}")
    return failed


def _worker(rank: int, size: int, port: int, paths: list[Path]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    from hg_scale.parallel import megatron

    megatron.initialize(size, 1)
    failed = compare(paths, megatron.MegatronLayers(), report=rank == 0)
    dist.destroy_process_group()
    if failed and rank == 0:
        raise SystemExit(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N")
    arguments = parser.parse_args()
    if arguments.tensor_parallel == 1:
        return 1 if compare(arguments.files) else 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = arguments.tensor_parallel
    try:
        mp.start_processes(_worker, (size, port, arguments.files), size, start_method="spawn")
    except mp.ProcessExitedException:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
