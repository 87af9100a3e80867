"""Score a model on held-out text."""

from __future__ import annotations

import argparse
import json
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hg_scale.commands.user_errors import refuse_unwritable, report_out_of_memory
from hg_scale.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from hg_scale.data.protocol import WindowProtocol
    from hg_scale.evaluation.scoring import Score
    from hg_scale.evaluation.task import EvaluationSubject

HELP = "score a run, a checkpoint or an export on text, in bits per byte"
WINDOW, STRIDE = 4096, 128  # of the paper's sliding protocol, section 3.3


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, metavar="RUN_OR_CHECKPOINT_OR_EXPORT",
        help="a run folder (its newest checkpoint), a checkpoint folder, or an export")  # fmt: skip
    add("--data", metavar="SHARDS_OR_FILE",
        help="prepared corpus, or a plain text file (default: the corpus of the run, the "
        "first of several)")  # fmt: skip
    add("--split", help="train, validation or test of a prepared corpus (default: test)")
    add("--context", type=int, metavar="N",
        help="windows of N tokens that follow each other (default: as in training)")  # fmt: skip
    add("--window", type=int, metavar="N",
        help=f"sliding windows of N tokens (the paper: {WINDOW}), of which the last --stride "
        "are scored")  # fmt: skip
    add("--stride", type=int, metavar="N",
        help=f"tokens from one sliding window to the next (default: {STRIDE}, or --window where "
        "that is less, which is no context)")  # fmt: skip
    add("--windows", type=int, metavar="N", help="score the first N windows only")
    add("--batch", type=int, default=8, metavar="N", help="windows at once (default: 8)")
    add("--processes", type=int, default=1, metavar="N",
        help="share the windows out over N processes, a GPU each (default: 1)")  # fmt: skip
    add("--precision", choices=("fp32", "bf16"), default="fp32",
        help="what to compute in (default: fp32)")  # fmt: skip
    add("--all", action="store_true",
        help="every whole checkpoint of a run, a line each; --json then is a list")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="also write the figures here")


@report_out_of_memory()
def run(options: argparse.Namespace) -> int:
    _check(options)
    models = _checkpoints(options.model) if options.all else [options.model]
    found = []
    for model in models:
        subject, score = _score(options, model)
        found.append(figures(subject, score, options.precision))
        if options.json:  # first: whoever reads the table may have left
            options.json.write_text(json.dumps(found if options.all else found[0], indent=2) + "\n")
        if options.all:
            print(_in_a_line(subject, score), flush=True)
        else:
            _print(subject, score)
    return 0


def _checkpoints(run: Path) -> list[Path]:
    """All whole ones of a run, oldest first."""
    from hg_scale.checkpoint.find import checkpoints_in, damage

    folder = run / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"--all: {run} is not a run folder with checkpoints/")
    whole = [path for _, path in sorted(checkpoints_in(folder).items()) if not damage(path)]
    if not whole:
        raise UserError(f"--all: {folder} holds no whole checkpoint")
    return whole


def _score(options: argparse.Namespace, model: Path) -> tuple[EvaluationSubject, Score]:
    from rich.console import Console
    from rich.progress import Progress

    from hg_scale.evaluation.task import EvaluationTask, evaluate

    stride = options.stride or STRIDE
    task = EvaluationTask(
        model, options.data, options.split, options.context or options.window,
        min(stride, options.window) if options.window else None,
        options.windows, options.batch, options.precision,
    )  # fmt: skip
    terminal = Console(stderr=True)
    with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        bar = progress.add_task("scoring", total=None)
        return evaluate(
            task,
            options.processes,
            lambda tokens, of: progress.update(bar, advance=tokens, total=of),
        )


def _check(options: argparse.Namespace) -> None:
    for name in ("context", "window", "stride", "windows", "batch", "processes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}: expected a number above 0, got {value}")
    if options.context and options.window:
        raise UserError("--context and --window: give one of them")
    if options.stride and not options.window:
        raise UserError("--stride: needs --window")
    if options.stride and options.stride > options.window:
        raise UserError(f"--stride: at most --window {options.window}, or tokens would be left out")
    if options.json:
        refuse_unwritable(options.json)


def figures(subject: EvaluationSubject, score: Score, precision: str) -> dict[str, Any]:
    """All that was measured, for a file."""
    period = subject.trained.model.config.parsed.total_factor
    spread = score.bits_per_byte * score.byte_interval
    found: dict[str, Any] = {
        "model": str(subject.trained.path),
        "step": subject.trained.step,
        "text": subject.name,
        "precision": precision,
        "window": subject.how.length,
        "stride": subject.how.stride,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "nats_per_token": score.nats_per_token,
        "bits_per_token": score.bits_per_token,
        "bits_per_byte": score.bits_per_byte,
        "interval_95_half_width": None if spread != spread else spread,  # JSON has no NaN
    }
    if subject.images:
        found["bits_per_dimension"] = score.bits_per_token
    found["nats_by_position"] = [
        {"from": a, "to": b, "nats_per_token": nats, "tokens": tokens}
        for a, b, nats, tokens in score.by_position(edges(subject.how))
    ]
    found["nats_by_phase"] = [
        {"phase": phase, "nats_per_token": nats if tokens else None, "tokens": tokens}
        for phase, (nats, tokens) in enumerate(score.by_phase(period))
    ]
    return found


def edges(how: WindowProtocol) -> list[int]:
    """0, 1, 2, 4, 8, ... up to the length: context grows in doublings.

    Of sliding windows up to the last `stride` positions, which stand by themselves: what is before
    them is scored in the first window only.
    """
    head = how.length - how.stride or how.length
    powers = [2**i for i in range(head.bit_length()) if 2**i < head]
    return sorted({0, *powers, head, how.length})


def _in_a_line(subject: EvaluationSubject, score: Score) -> str:
    line = f"step {subject.trained.step:>9,}  {score.bits_per_byte:.4f} bits a byte"
    spread = score.bits_per_byte * score.byte_interval
    return line + (f" (95% interval +- {spread:.4f})" if spread == spread else "")


def _print(subject: EvaluationSubject, score: Score) -> None:
    from rich.console import Console

    how, trained = subject.how, subject.trained
    spread = score.bits_per_byte * score.byte_interval
    print(f"{trained.path}, step {trained.step:,}, on {subject.name}")
    if how.stride == how.length:
        protocol = f"windows of {how.length:,} tokens without context"
    else:
        protocol = f"windows of {how.length:,} tokens, the last {how.stride:,} of each scored"
    print(f"  {score.tokens:,} tokens, {score.bytes:,} bytes, each scored once; {protocol}")
    print(
        f"  {score.nats_per_token:.4f} nats a token, {score.bits_per_token:.4f} bits a token, "
        f"{score.bits_per_byte:.4f} bits a byte"
        + (f" (95% interval +- {spread:.4f})" if spread == spread else "")
    )
    if subject.images:
        print(f"  {score.bits_per_token:.4f} bits a dimension")
    console = Console(width=None if Console().is_terminal else 100)
    console.print(_positions(subject, score))


def _positions(subject: EvaluationSubject, score: Score) -> Table:
    """Bits a token by place in the window, and by place in the outermost group of the innermost."""
    from rich.table import Table

    table = Table(title="bits a token by position", title_justify="left")
    table.add_column("position in the window", justify="right")
    table.add_column("bits", justify="right")
    table.add_column("tokens", justify="right")
    for a, b, nats, tokens in score.by_position(edges(subject.how)):
        name = f"{a:,}" if b == a + 1 else f"{a:,} to {b - 1:,}"
        table.add_row(name, f"{nats / log(2):.4f}", f"{tokens:,}")
    period = subject.trained.model.config.parsed.total_factor
    if period > 1:
        table.add_section()
        for phase, (nats, tokens) in enumerate(score.by_phase(period)):
            if tokens:
                table.add_row(f"{phase} modulo {period}", f"{nats / log(2):.4f}", f"{tokens:,}")
    return table
