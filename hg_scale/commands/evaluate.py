"""Score a trained model on held-out text."""

from __future__ import annotations

import argparse
import json
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hg_scale.arguments import add_model_options, local_path
from hg_scale.commands.user_errors import refuse_unwritable, report_out_of_memory
from hg_scale.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from hg_scale.data.protocol import SlidingWindows
    from hg_scale.evaluation.scoring import Score
    from hg_scale.evaluation.task import EvaluationSetup

HELP = "score a run, a checkpoint or an export on text, in bits per byte"
WINDOW, STRIDE = 4096, 128  # the paper's sliding protocol, section 3.3


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_options(parser)
    add("--data", metavar="SHARDS_OR_FILE",
        help="prepared corpus; or a file: text, JSON lines, CSV, TSV, Parquet or Arrow, also "
        "compressed (default: the run's corpus, the first of several)")  # fmt: skip
    add("--field", default="text", metavar="NAME",
        help="field or column with the text of such a file (default: text)")  # fmt: skip
    add("--bytes-as-they-are", action="store_true", dest="as_they_are",
        help="score the stored bytes of a file, whatever it contains")  # fmt: skip
    add("--split",
        help="train, validation or test split of a prepared corpus (default: test)")  # fmt: skip
    add("--context", type=int, metavar="N",
        help="consecutive windows of N tokens (default: the training sequence length)")  # fmt: skip
    add("--window", type=int, metavar="N",
        help=f"sliding windows of N tokens (paper: {WINDOW}); the last --stride tokens of each "
        "are scored")  # fmt: skip
    add("--stride", type=int, metavar="N",
        help=f"tokens from one sliding window to the next (default: {STRIDE}, at most "
        "--window)")  # fmt: skip
    add("--first-token", choices=("previous", "zero"), default="previous",
        help="first input of each window: the token before it, or id 0 as in the paper's code "
        "(default: previous)")  # fmt: skip
    add("--windows", type=int, metavar="N", help="score the first N windows only")
    add("--batch", type=int, default=8, metavar="N", help="windows per batch (default: 8)")
    add("--processes", type=int, default=1, metavar="N",
        help="split the windows over N processes, one GPU each (default: 1)")  # fmt: skip
    add("--all", action="store_true",
        help="score every complete checkpoint of a run, one line each; --json is a "
        "list")  # fmt: skip
    add("--json", type=local_path, metavar="FILE", help="also write the results to this file")


@report_out_of_memory()
def run(options: argparse.Namespace) -> int:
    _check(options)
    models = _complete_checkpoints(options.model) if options.all else [options.model]
    results = []
    for model in models:
        setup, score = _score(options, model)
        results.append(results_dict(setup, score, options.precision))
        if options.json:  # before printing: stdout may be a closed pipe
            content = results if options.all else results[0]
            options.json.write_text(json.dumps(content, indent=2) + "\n")
        if options.all:
            print(_summary_line(setup, score), flush=True)
        else:
            _print_results(setup, score)
    return 0


def _complete_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    from hg_scale.checkpoint.find import checkpoints_in, verify_sizes

    folder = run / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"--all: {run} is not a run folder with checkpoints/")
    complete = [
        path for _, path in sorted(checkpoints_in(folder).items()) if not verify_sizes(path)
    ]
    if not complete:
        raise UserError(f"--all: {folder} contains no complete checkpoint")
    return complete


def _score(options: argparse.Namespace, model: Path) -> tuple[EvaluationSetup, Score]:
    from rich.console import Console
    from rich.progress import Progress

    from hg_scale.evaluation.task import EvaluationTask, evaluate

    stride = options.stride or STRIDE
    task = EvaluationTask(
        model, options.data, options.split, options.context or options.window,
        min(stride, options.window) if options.window else None,
        options.windows, options.batch, options.precision, options.first_token, options.field,
        options.as_they_are,
    )  # fmt: skip
    terminal = Console(stderr=True)
    with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        bar = progress.add_task("scoring", total=None)
        return evaluate(
            task,
            options.processes,
            lambda tokens, total: progress.update(bar, advance=tokens, total=total),
        )


def _check(options: argparse.Namespace) -> None:
    """Raise UserError for options that are out of range or contradict each other."""
    for name in ("context", "window", "stride", "windows", "batch", "processes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}: expected 1 or more, got {value}")
    if options.context and options.window:
        raise UserError("--context and --window: give only one of them")
    if options.stride and not options.window:
        raise UserError("--stride: needs --window")
    if options.stride and options.stride > options.window:
        raise UserError(f"--stride: at most --window {options.window}, or tokens are skipped")
    if options.json:
        refuse_unwritable(options.json)


def results_dict(setup: EvaluationSetup, score: Score, precision: str) -> dict[str, Any]:
    """Return every measured figure, for --json."""
    period = setup.loaded.config.parsed.total_factor
    half_width = score.bits_per_byte * score.byte_interval
    results: dict[str, Any] = {
        "model": str(setup.loaded.path),
        "step": setup.loaded.step,
        "text": setup.text_name,
        "precision": precision,
        "window": setup.protocol.length,
        "stride": setup.protocol.stride,
        "first_token": setup.first_token,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "nats_per_token": score.nats_per_token,
        "bits_per_token": score.bits_per_token,
        "bits_per_byte": score.bits_per_byte,
        "interval_95_half_width": None if half_width != half_width else half_width,  # no NaN
    }
    if setup.images:
        results["bits_per_dimension"] = score.bits_per_token
    results["nats_by_position"] = [
        {"from": a, "to": b, "nats_per_token": nats, "tokens": tokens}
        for a, b, nats, tokens in score.by_position(position_edges(setup.protocol))
    ]
    results["nats_by_phase"] = [
        {"phase": phase, "nats_per_token": nats if tokens else None, "tokens": tokens}
        for phase, (nats, tokens) in enumerate(score.by_phase(period))
    ]
    return results


def position_edges(protocol: SlidingWindows) -> list[int]:
    """Return the edges of the position ranges shown: 0, 1, 2, 4, 8, ... up to the window length.

    With sliding windows the last `stride` positions are a range of their own: positions before
    them are scored in the first window only.
    """
    head = protocol.length - protocol.stride or protocol.length
    powers = [2**i for i in range(head.bit_length()) if 2**i < head]
    return sorted({0, *powers, head, protocol.length})


def _interval(score: Score) -> str:
    """The 95% interval in parentheses; empty where there are too few windows for one."""
    half_width = score.bits_per_byte * score.byte_interval
    return f" (95% interval +- {half_width:.4f})" if half_width == half_width else ""


def _summary_line(setup: EvaluationSetup, score: Score) -> str:
    line = f"step {setup.loaded.step:>9,}  {score.bits_per_byte:.4f} bits per byte"
    return line + _interval(score)


def _print_results(setup: EvaluationSetup, score: Score) -> None:
    from rich.console import Console

    loaded, length, stride = setup.loaded, setup.protocol.length, setup.protocol.stride
    print(f"{loaded.path}, step {loaded.step:,}, on {setup.text_name}")
    if stride == length:
        protocol = f"windows of {length:,} tokens without overlap"
    else:
        protocol = f"windows of {length:,} tokens, the last {stride:,} of each scored"
    if setup.first_token == "zero":
        protocol += ", each after token id 0"
    print(f"  {score.tokens:,} tokens, {score.bytes:,} bytes, each scored once; {protocol}")
    print(
        f"  {score.nats_per_token:.4f} nats per token, {score.bits_per_token:.4f} bits per token, "
        f"{score.bits_per_byte:.4f} bits per byte{_interval(score)}"
    )
    if setup.images:
        print(f"  {score.bits_per_token:.4f} bits per dimension")
    console = Console(width=None if Console().is_terminal else 100)
    console.print(_position_table(setup, score))


def _position_table(setup: EvaluationSetup, score: Score) -> Table:
    """Bits per token by position in the window, and by position modulo the total factor."""
    from rich.table import Table

    table = Table(title="bits per token by position", title_justify="left")
    table.add_column("position in the window", justify="right")
    table.add_column("bits", justify="right")
    table.add_column("tokens", justify="right")
    for a, b, nats, tokens in score.by_position(position_edges(setup.protocol)):
        name = f"{a:,}" if b == a + 1 else f"{a:,} to {b - 1:,}"
        table.add_row(name, f"{nats / log(2):.4f}", f"{tokens:,}")
    period = setup.loaded.config.parsed.total_factor
    if period > 1:
        table.add_section()
        for phase, (nats, tokens) in enumerate(score.by_phase(period)):
            if tokens:
                table.add_row(f"{phase} modulo {period}", f"{nats / log(2):.4f}", f"{tokens:,}")
    return table
