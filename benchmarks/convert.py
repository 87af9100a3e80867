"""Measure the speed of conversions against plain copying, and their memory.

    python benchmarks/convert.py [--gigabytes 1] [--workers 1] [--repeat 3] [--folder DIR]

Makes a checkpoint of so many gigabytes of fp32 parameters (three times that on disk, with the
moments), sharded as by TP2 x DP2 with ZeRO. Then runs each conversion, alternating with a copy of
as many bytes as it writes; both are synced to disk. Each conversion runs in a process of its own,
whose anonymous memory is sampled every 10 ms: it includes the interpreter and torch, but neither
the page cache nor further workers.

`export` ends by comparing logits; "comparing" are the seconds of that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from math import prod
from pathlib import Path
from statistics import median
from threading import Event, Thread
from time import perf_counter
from typing import Any

import torch

from hg_scale.checkpoint.checksum import ComputeChecksum
from hg_scale.checkpoint.fragments import KINDS, Fragment, Slice
from hg_scale.checkpoint.manifest import CHECKPOINT_VERSION, MANIFEST, seal
from hg_scale.checkpoint.safetensors_file import create_safetensors
from hg_scale.config.load import parse_config
from hg_scale.config.schema import Config, ModelConfig
from hg_scale.convert.export import export
from hg_scale.convert.health import find_problems
from hg_scale.convert.open import open_checkpoint, open_source
from hg_scale.convert.to_checkpoint import to_checkpoint
from hg_scale.convert.universal import tensor_parallel_dims, to_deepspeed
from hg_scale.model.hourglass import parameter_shapes

TENSOR = DATA = 2


def model_of_size(gigabytes: float) -> ModelConfig:
    """Return a model of the paper's kind, of width 1024 and the depth that gives this size."""
    shape = {
        "d_model": 1024,
        "heads": 16,
        "d_ff": 4096,
        "vocab_size": 32_000,
        "sequence_length": 1536,
    }

    def model(blocks: int) -> ModelConfig:
        return parse_config({"model": {"hierarchy": f"1@1 {blocks}@3 1@1", **shape}}).model

    def bytes_of(blocks: int) -> int:
        return 4 * sum(map(prod, parameter_shapes(model(blocks)).values()))

    one, two = bytes_of(1), bytes_of(2)
    return model(max(1, 1 + round((gigabytes * 1e9 - one) / (two - one))))


def make_checkpoint(folder: Path, model: ModelConfig) -> None:
    """Write random weights in four files, as four ranks would."""
    folder.mkdir(parents=True)
    shapes, dims = parameter_shapes(model), tensor_parallel_dims(model)
    files = []
    for rank in range(TENSOR * DATA):
        tensor, data = rank % TENSOR, rank // TENSOR
        fragments = []
        for name, shape in shapes.items():
            dim = dims[name]
            piece = Slice(name, shape) if dim is None else Slice(name, shape, dim, tensor, TENSOR)
            parts = DATA if dim is not None else DATA * TENSOR
            part = data if dim is not None else rank
            edges = [piece.size * i // parts for i in range(parts + 1)]
            start, stop = list(pairwise(edges))[part]
            fragments.append(Fragment(piece, start, stop - start))
        file = f"rank-{rank:05}.safetensors"
        flat = [(f"{n}.{k}", (f.length,)) for k in KINDS for n, f in enumerate(fragments)]
        for key, region in create_safetensors(folder / file, flat).items():
            generator = torch.Generator().manual_seed(rank)
            length = fragments[int(key.partition(".")[0])].length
            region.write(0, torch.empty(length).uniform_(0, 0.05, generator=generator))
        entry = {"name": file, "bytes": (folder / file).stat().st_size}
        listed = [fragment.to_json() for fragment in fragments]
        files.append({**entry, "checksum": ComputeChecksum(folder)(file), "fragments": listed})
    manifest = {
        "format_version": CHECKPOINT_VERSION, "step": 1, "optimizer_step": 1,
        "progress": {"step": 1, "position": 0, "skipped": 0, "data": {}},
        "layout": {"tensor": TENSOR, "pipeline": 1, "data": DATA, "zero_stage": 1},
        "config": Config(model=model).model_dump(), "versions": {}, "files": files,
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(seal(manifest)))


class Stages:
    """A progress reporter that records how long each stage took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def begin(self, what: str, total: int | None) -> None:
        self._stage, self._begun = what, perf_counter()

    def advance(self, count: int) -> None:
        self.seconds[self._stage] = perf_counter() - self._begun


class AnonymousMemory:
    """Context manager: the peak RssAnon of this process, in bytes."""

    def __enter__(self) -> AnonymousMemory:
        self.peak, self._done = anonymous_bytes(), Event()
        self._thread = Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, anonymous_bytes())


def warm(file: Path, size: int) -> None:
    """Write and remove a file, so that what is timed next reuses pages of the page cache.

    New pages cost a virtual machine ten times as much as filling them.
    """
    with file.open("wb") as data:
        for _ in range(-(-size // (1 << 24))):
            data.write(bytes(1 << 24))
    file.unlink()


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def measure(verb: str, source: Path, out: Path, workers: int) -> dict[str, float]:
    """Run one conversion in this process; return its seconds and bytes of memory."""
    report = Stages()
    warm(out.with_name("warm"), size_of(source))
    before = anonymous_bytes()
    start = perf_counter()
    with AnonymousMemory() as memory:
        if verb in ("export", "export bf16"):
            dtype = "bf16" if verb.endswith("bf16") else "fp32"
            export(open_source(source), out, dtype=dtype, workers=workers, report=report)
        elif verb == "to-deepspeed":
            to_deepspeed(open_checkpoint(source), out, workers=workers, report=report)
        elif verb == "verify":
            assert not list(find_problems(open_source(source), workers, report))
        else:
            to_checkpoint(open_source(source), out, workers=workers, report=report)
    end = perf_counter()
    return {"seconds": end - start, "before": before, "peak": memory.peak,
            "comparing": report.seconds.get("comparing logits", 0.0),
            "checksums": report.seconds.get("checksums", 0.0)}  # fmt: skip


def size_of(path: Path) -> int:
    """Return the bytes that a folder takes on disk; holes of sparse files take none."""
    return sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file())


def copy(source: Path, out: Path, size: int) -> float:
    """Return the seconds to copy `size` bytes of a checkpoint's files and sync them."""
    out.mkdir()
    warm(out / "warm", size)
    start, left = perf_counter(), size
    for file in sorted(source.glob("*.safetensors")):
        with file.open("rb") as data, (out / file.name).open("wb") as target:
            while left > 0 and (sent := os.sendfile(target.fileno(), data.fileno(), None, left)):
                left -= sent
            os.fsync(target.fileno())
    seconds = perf_counter() - start
    shutil.rmtree(out)
    return seconds * size / (size - max(left, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, metavar="GB")
    parser.add_argument("--workers", type=int, default=1, metavar="N")
    parser.add_argument("--repeat", type=int, default=3, metavar="N")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where to write (default: /tmp)")
    parser.add_argument(
        "--measure", nargs=3, metavar=("VERB", "SOURCE", "OUT"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.measure:
        verb, source, out = options.measure
        print(json.dumps(measure(verb, Path(source), Path(out), options.workers)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        run(Path(name), options)


def run(folder: Path, options: argparse.Namespace) -> None:
    model = model_of_size(options.gigabytes)
    make_checkpoint(folder / "checkpoint", model)
    size = 4 * sum(map(prod, parameter_shapes(model).values()))
    print(
        f"{size / 1e9:.2f} GB of fp32 parameters, '{model.hierarchy}', --workers {options.workers}"
    )
    print(
        "conversion      MB/s  of copying  seconds  checksums  comparing  memory before      peak"
    )
    sources = {"import": "export", "from-deepspeed": "to-deepspeed"}
    for verb in ("export", "export bf16", "import", "to-deepspeed", "from-deepspeed", "verify"):
        source, out = folder / sources.get(verb, "checkpoint"), folder / verb
        rounds: list[dict[str, Any]] = []
        copies = []
        for number in range(options.repeat):
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            command = [sys.executable, __file__, "--workers", str(options.workers)]
            done = subprocess.run(
                [*command, "--measure", verb, str(source), str(out)],
                check=True, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            rounds.append(json.loads(done.stdout))
            moved = size_of(out) if out.exists() else size_of(source)
            if number < options.repeat - 1:  # a later conversion starts from the last
                shutil.rmtree(out, ignore_errors=True)
            os.sync()
            copies.append(copy(folder / "checkpoint", folder / "copy", moved))
        seconds, checksums, comparing, before, peak = (
            median(r[key] for r in rounds)
            for key in ("seconds", "checksums", "comparing", "before", "peak")
        )
        rate = moved / median(r["seconds"] - r["comparing"] for r in rounds)
        print(
            f"{verb:14} {rate / 1e6:5.0f}  {rate * median(copies) / moved:10.2f}  {seconds:7.2f}"
            f"  {checksums:9.2f}  {comparing:9.2f}  {before / 1e6:10.0f} MB  {peak / 1e6:5.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
