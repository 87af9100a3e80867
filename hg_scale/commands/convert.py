"""`hg-scale convert`: inspect, verify, export, import, compare and average checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hg_scale.arguments import local_path

if TYPE_CHECKING:
    from rich.console import Console

    from hg_scale.convert.source import WeightSource
    from hg_scale.data.tokenizer import Tokenizer

HELP = "inspect, verify, export, import, compare and average checkpoints"

_SOURCES = (
    "a run (its newest checkpoint), a checkpoint, an export, a golden file or DeepSpeed's files"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="convert_verb", metavar="VERB", required=True)

    def verb(
        name: str, run_verb: Callable[[argparse.Namespace], int], text: str, *paths: str
    ) -> Callable[..., Any]:
        parser = verbs.add_parser(name, help=text, description=text)
        for path in paths:
            parser.add_argument(path.lower(), type=local_path, metavar=path)
        add = parser.add_argument
        add("--workers", type=_at_least_one, default=1, metavar="N", help="processes (default: 1)")
        parser.set_defaults(run_convert_verb=run_verb)
        return add

    add = verb("inspect", _inspect, f"show the contents of {_SOURCES}", "SOURCE")
    add("--brief", action="store_true", help="read no weights, so no statistics of them")
    verb("verify", _verify, "verify checksums, that every element is stored exactly once, and that "
         "all numbers are finite", "SOURCE")  # fmt: skip
    for name, run_verb, text in (
        ("export", _export, "write safetensors, config.json, tokenizer and a model card"),
        ("to-hf", _to_hf, "write a folder that transformers loads with trust_remote_code"),
    ):
        add = verb(name, run_verb, text, "SOURCE", "OUT")
        add("--dtype", choices=("fp32", "bf16"), default="fp32",
            help="of the weights (default: fp32)")  # fmt: skip
        add("--data", metavar="SHARDS", help="prepared data with the tokenizer to export; default: "
            "that of the run, if available")  # fmt: skip
        add("--shard-gb", type=float, default=5.0, metavar="GB",
            help="largest file (default: 5)")  # fmt: skip

    def allow_non_finite(add: Callable[..., Any]) -> None:
        add("--allow-non-finite", action="store_true", help="write NaN, infinity and negative "
            "second moments as they are, instead of refusing them")  # fmt: skip

    add = verb("import", _import, "make a checkpoint to train from, of an export or a golden file",
               "SOURCE", "OUT")  # fmt: skip
    allow_non_finite(add)
    add = verb("from-hf", _import, "make a checkpoint of a folder written by to-hf", "SOURCE",
               "OUT")  # fmt: skip
    allow_non_finite(add)
    add = verb("to-deepspeed", _to_deepspeed, "write DeepSpeed's universal format", "CHECKPOINT",
               "OUT")  # fmt: skip
    allow_non_finite(add)
    add = verb("from-deepspeed", _import, "make a checkpoint of DeepSpeed's universal format or "
               "of its consolidated fp32 weights", "SOURCE", "OUT")  # fmt: skip
    add("--config", type=local_path, metavar="FILE", help="configuration with the model, if the "
        "files do not contain it")  # fmt: skip
    allow_non_finite(add)
    add = verb("diff", _diff, "show the largest differences by tensor; exit with 1 if there are "
               "any", "A", "B")  # fmt: skip
    add("--top", type=int, default=20, metavar="N", help="tensors to list (default: 20)")
    add = verb("average", _average, "make a checkpoint of the mean of weights")
    add("sources", type=local_path, nargs="+", metavar="SOURCE")
    add("--out", type=local_path, required=True, metavar="OUT")
    allow_non_finite(add)


def run(options: argparse.Namespace) -> int:
    return options.run_convert_verb(options)


def _console() -> Console:
    """Return a console on standard output, with lines of 160 characters if it is not a terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def _print_note(line: str) -> None:
    """Print which checkpoints of a run are skipped, and why."""
    import sys

    print(f"hg-scale convert: {line}", file=sys.stderr)


def _at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of processes, got '{text}'")
    return int(text)


def _inspect(options: argparse.Namespace) -> int:
    from rich.table import Table

    from hg_scale.convert.health import examine_tensors
    from hg_scale.convert.inspection import summarize, tensors_table
    from hg_scale.convert.open import open_source
    from hg_scale.data.progress import on_stderr

    source = open_source(options.source, report=_print_note)
    health = []
    if not options.brief:
        with on_stderr() as progress:
            health = list(examine_tensors(source, options.workers, progress))
    console = _console()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in summarize(source, health).items():
        grid.add_row(key, value)
    console.print(str(source.path), style="bold", markup=False)
    console.print(grid)
    console.print(tensors_table(source, health))
    return 1 if any(h.problem for h in health) else 0


def _verify(options: argparse.Namespace) -> int:
    import sys

    from hg_scale.convert.health import find_problems
    from hg_scale.convert.open import open_source
    from hg_scale.data.progress import on_stderr

    source, problems = open_source(options.source, report=_print_note), 0
    with on_stderr() as progress:
        for problem in find_problems(source, options.workers, progress):
            problems += 1
            print(f"hg-scale convert verify: {problem}", file=sys.stderr)
    if problems:
        print(f"{source.path}: {problems} problems")
        return 1
    print(
        f"{source.path}: complete {source.format_name} of step {source.step:,}: "
        f"{len(source.shapes)} tensors, {source.parameters:,} parameters, {', '.join(source.kinds)}"
    )
    return 0


def _export(options: argparse.Namespace) -> int:
    from hg_scale.convert.export import export

    return _write_export(options, export)


def _to_hf(options: argparse.Namespace) -> int:
    from hg_scale.convert.huggingface import to_huggingface

    return _write_export(options, to_huggingface)


def _write_export(options: argparse.Namespace, write: Callable[..., float]) -> int:
    from hg_scale.checkpoint.errors import CheckpointError
    from hg_scale.convert.open import open_source
    from hg_scale.data.progress import on_stderr

    if not 0 < options.shard_gb < inf:
        raise CheckpointError(f"--shard-gb {options.shard_gb}: expected a number above 0")
    source = open_source(options.source, report=_print_note)
    tokenizer = _tokenizer(source, options.data)
    with on_stderr() as progress:
        difference = write(
            source, options.out, dtype=options.dtype, workers=options.workers,
            shard_bytes=int(options.shard_gb * 1e9), tokenizer=tokenizer, report=progress,
        )  # fmt: skip
    print(
        f"{options.out}: {source.parameters:,} parameters of step {source.step:,} in "
        f"{options.dtype}; largest difference of the logits {difference:.2e}"
    )
    return 0


def _tokenizer(source: WeightSource, data: str | None) -> Tokenizer | None:
    """Return the tokenizer of `data`, of the run's data, or of the run folder, in this order.

    Sets `source.images` if the data is available. Returns None, with a warning if that loses a
    model file, if none of these is.
    """
    import sys

    from hg_scale.checkpoint.run_tokenizer import load_run_tokenizer
    from hg_scale.convert.checkpoint_source import CheckpointSource
    from hg_scale.data.errors import DataError
    from hg_scale.data.index import is_local, read_index

    if data:
        index = read_index(data)
        source.images = index.image_shape
        return index.open_tokenizer()
    if not isinstance(source, CheckpointSource):
        return None
    section = source.manifest["config"].get("data", {})
    sources = section.get("sources") or [{}]
    path = section.get("path") or sources[0].get("path")
    try:
        if path and is_local(path):
            index = read_index(path)
            source.images = index.image_shape
            return index.open_tokenizer()
    except DataError:
        pass
    if tokenizer := load_run_tokenizer(source.path, source.tokenizer):
        return tokenizer
    if source.tokenizer is None or source.tokenizer["sha256"]:  # it has a model file
        print(
            f"{source.path}: its data is not available, so no tokenizer is exported; name it with "
            "--data SHARDS",
            file=sys.stderr,
        )
    return None


def _import(options: argparse.Namespace) -> int:
    from hg_scale.config.load import load_config
    from hg_scale.convert.open import open_source
    from hg_scale.convert.to_checkpoint import to_checkpoint
    from hg_scale.data.progress import on_stderr

    config = getattr(options, "config", None)
    source = open_source(options.source, load_config(config).model if config else None, _print_note)
    with on_stderr() as progress:
        to_checkpoint(
            source, options.out, workers=options.workers, report=progress,
            allow_non_finite=options.allow_non_finite,
        )  # fmt: skip
    return _print_how_to_train(options.out)


def _average(options: argparse.Namespace) -> int:
    from hg_scale.convert.average import AverageSource
    from hg_scale.convert.open import open_source
    from hg_scale.convert.to_checkpoint import to_checkpoint
    from hg_scale.data.progress import on_stderr

    source = AverageSource([open_source(path, report=_print_note) for path in options.sources])
    with on_stderr() as progress:
        to_checkpoint(
            source, options.out, workers=options.workers, report=progress,
            allow_non_finite=options.allow_non_finite,
        )  # fmt: skip
    return _print_how_to_train(options.out)


def _print_how_to_train(out: Path) -> int:
    from hg_scale.convert.open import open_checkpoint

    source = open_checkpoint(out)
    step = source.manifest["progress"]["step"]
    state = f"with Adam's moments, at step {step:,}" if step else "weights only, at step 0"
    print(f"{out}: {source.parameters:,} parameters, {state}")
    print(f"train from it with --set checkpoint.start_from={out}")
    return 0


def _to_deepspeed(options: argparse.Namespace) -> int:
    from hg_scale.convert.open import open_checkpoint
    from hg_scale.convert.universal import to_deepspeed
    from hg_scale.data.progress import on_stderr

    source = open_checkpoint(options.checkpoint, _print_note)
    with on_stderr() as progress:
        to_deepspeed(
            source, options.out, workers=options.workers, report=progress,
            allow_non_finite=options.allow_non_finite,
        )  # fmt: skip
    print(f"{options.out}: step {source.step:,} in DeepSpeed's universal format")
    return 0


def _diff(options: argparse.Namespace) -> int:
    from hg_scale.convert.compare import tensor_differences
    from hg_scale.convert.inspection import differences_table
    from hg_scale.convert.open import open_source
    from hg_scale.data.progress import on_stderr

    a, b = (open_source(path, report=_print_note) for path in (options.a, options.b))
    with on_stderr() as progress:
        found = list(tensor_differences(a, b, options.workers, progress))
    unequal = [d for d in found if d.unequal]
    compared = ", ".join(dict.fromkeys(d.kind for d in found))
    if not unequal:
        print(f"bit-equal: {len(found)} tensors ({compared})")
        return 0
    _console().print(differences_table(unequal, options.top))
    print(f"{len(unequal)} of {len(found)} tensors differ ({compared})")
    return 1
