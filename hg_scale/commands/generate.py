"""Write text, or draw images, with a trained model."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from hg_scale.commands.user_errors import refuse_unwritable, report_out_of_memory
from hg_scale.errors import UserError

if TYPE_CHECKING:
    from hg_scale.evaluation.generation import GenerationConfig, Piece
    from hg_scale.evaluation.loaded_model import LoadedModel

HELP = "write text after a prompt, or draw images, with a trained model"

TOKENS = 500
KEEP = 0.5  # of an image that is completed
MOST_IMAGES = 256  # that one page shows
_HEADER = 60  # characters of a prompt that head its text


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, metavar="RUN_OR_CHECKPOINT_OR_EXPORT",
        help="a run folder (its newest checkpoint), a checkpoint folder, or an export")  # fmt: skip
    add("--prompt", action="append", metavar="TEXT",
        help="what to go on from; may be repeated (default: a new document)")  # fmt: skip
    add("--prompts", type=Path, metavar="FILE",
        help="prompts, one a line; an empty one begins a new document")  # fmt: skip
    add("--tokens", type=int, metavar="N", help=f"at most, of a text (default: {TOKENS})")
    add("--temperature", type=float, default=0.8, metavar="T",
        help="0: always the likeliest token; 1: as the model says (default: 0.8)")  # fmt: skip
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    add("--top-p", type=float, default=1.0, metavar="P",
        help="draw from the likeliest that have probability P together (default: 1)")  # fmt: skip
    add("--seed", type=int, default=1, help="equal seeds write equal texts (default: 1)")
    add("--count", type=int, default=None, metavar="N",
        help="texts for each prompt or completions of each image (default: 1), or new images "
        "(default: 16)")  # fmt: skip
    add("--batch", type=int, default=16, metavar="N", help="how many at once (default: 16)")
    add("--context", type=int, metavar="N",
        help="tokens the model sees; when they are full it goes on from the last half "
        "(default: as many as it was trained on)")  # fmt: skip
    add("--complete", type=Path, nargs="+", metavar="IMAGE",
        help="images (.png, .jpg, .npy, .npz), of which to draw the lower part anew; at most "
        f"{MOST_IMAGES}")  # fmt: skip
    add("--keep", type=float, metavar="SHARE",
        help=f"share of an image that --complete keeps (default: {KEEP})")  # fmt: skip
    add("--output", type=Path, metavar="FILE",
        help="text: JSON lines, too; images: the PNG (default: samples.png)")  # fmt: skip
    add("--data", metavar="SHARDS", help="prepared corpus (default: that of the run)")
    add("--precision", choices=("fp32", "bf16"), default="fp32",
        help="what to compute in (default: fp32)")  # fmt: skip


@report_out_of_memory()
def run(options: argparse.Namespace) -> int:
    _check(options)

    from hg_scale.evaluation.generation import GenerationConfig
    from hg_scale.evaluation.loaded_model import load
    from hg_scale.model.sampling import Sampling

    trained = load(options.model, options.data, options.precision)
    how = GenerationConfig(
        Sampling(options.temperature, options.top_k, options.top_p),
        options.tokens or TOKENS, options.seed, options.batch, options.context,
    )  # fmt: skip
    shape = trained.images
    if shape is None:
        if options.complete:
            raise UserError(f"--complete is for images; {trained.subject} holds text: use --prompt")
        if options.output:
            refuse_unwritable(options.output)
        return _write(trained, _prompts(options), how, options.output)
    if options.prompt or options.prompts:
        raise UserError(f"--prompt is for text; {trained.subject} holds images: use --complete")
    if options.tokens is not None:
        raise UserError(f"--tokens is for text; {trained.subject} holds images of one size")
    return _draw(trained, shape, how, options)


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot be meant."""
    problems = {
        "--tokens: expected a number above 0": options.tokens is not None and options.tokens < 1,
        "--count: expected a number above 0": options.count is not None and options.count < 1,
        "--batch: expected a number above 0": options.batch < 1,
        "--context: expected a number above 1": options.context is not None and options.context < 2,
        "--temperature: expected 0 or more": not 0 <= options.temperature < float("inf"),
        "--top-k: expected a number above 0": options.top_k is not None and options.top_k < 1,
        "--top-p: expected a number above 0, up to 1": not 0 < options.top_p <= 1,
        "--keep: expected a number from 0 to below 1": options.keep is not None
        and not 0 <= options.keep < 1,
        "--keep: needs --complete": options.keep is not None and not options.complete,
        "--prompt and --prompts: give one of them": bool(options.prompt and options.prompts),
    }
    for problem, found in problems.items():
        if found:
            raise UserError(problem)


def _prompts(options: argparse.Namespace) -> list[bytes]:
    prompts = [os.fsencode(text) for text in options.prompt or [""]]
    if options.prompts:
        try:
            prompts = options.prompts.read_bytes().splitlines()
        except OSError as error:
            raise UserError(f"{options.prompts}: cannot be read ({error.strerror})") from None
        if not prompts:
            raise UserError(f"{options.prompts}: is empty; expected a prompt a line")
    return [prompt for prompt in prompts for _ in range(options.count or 1)]


def _write(
    trained: LoadedModel, prompts: list[bytes], how: GenerationConfig, output: Path | None
) -> int:
    """Each prompt and what follows it, one after the other; the first as it is made."""
    import json

    from hg_scale.evaluation.generation import in_order, write_texts

    trained.open_tokenizer()  # what it lacks is told before the output is written over
    readable = [prompt.decode(errors="replace") for prompt in prompts]
    text, row = "", -1
    with output.open("w") if output else nullcontext() as file:
        for piece in in_order(write_texts(trained, prompts, how)):
            try:
                _show(piece, readable, first=piece.row != row)
            except BrokenPipeError:  # behind `head`: nobody reads on
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                if not file:
                    return 0
            text, row = piece.text if piece.row != row else text + piece.text, piece.row
            if file and piece.last:  # a line is there when its text is made
                file.write(json.dumps({"prompt": readable[row], "text": text}) + "\n")
                file.flush()
    return 0


def _show(piece: Piece, prompts: list[str], first: bool) -> None:
    """Put a piece on the terminal, after its prompt where it is the first of its text."""
    from hg_scale.data.inspection import printable

    out = sys.stdout
    if hasattr(out, "reconfigure"):
        out.reconfigure(errors="replace")
    if first:
        if len(prompts) > 1:
            head = " ".join(prompts[piece.row].split())[:_HEADER]
            out.write(f"--- {piece.row + 1} of {len(prompts)}: {printable(head)}\n")
        out.write(printable(prompts[piece.row]))
    out.write(printable(piece.text) + ("\n" if piece.last else ""))
    out.flush()


def _draw(
    trained: LoadedModel,
    shape: tuple[int, int, int],
    how: GenerationConfig,
    options: argparse.Namespace,
) -> int:
    """New images as a square; or, a line each: what was given, what was made of it, the original.

    That is the arrangement of the paper's Figure 8.
    """
    import math

    import numpy as np
    from rich.console import Console
    from rich.progress import Progress

    from hg_scale.evaluation.generation import draw_images, upper_part
    from hg_scale.evaluation.pictures import read_images, write_grid

    path = options.output or Path("samples.png")
    refuse_unwritable(path)
    originals = read_images(options.complete or [], shape, MOST_IMAGES)
    count = options.count or (1 if originals else 16)
    keep = KEEP if options.keep is None else options.keep
    kept = math.floor(keep * shape[0]) if originals else 0  # rows of pixels
    given = [image[:kept].reshape(-1) for image in originals for _ in range(count)]
    given = given or [np.empty(0, np.uint8)] * count
    images: list[np.ndarray] = [np.empty(0)] * len(given)
    work = len(given) * (math.prod(shape) - given[0].size)
    terminal = Console(stderr=True)
    with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        task = progress.add_task("drawing", total=work)
        for row, image in draw_images(trained, given, how):
            progress.advance(task)
            if image is not None:
                images[row] = image
    if originals:
        grid = [
            [upper_part(original, kept), *images[i * count : (i + 1) * count], original]
            for i, original in enumerate(originals)
        ]
    else:
        side = math.ceil(math.sqrt(count))
        grid = [images[i : i + side] for i in range(0, count, side)]
    write_grid(path, grid)
    what = "given, drawn, original" if originals else f"{count} images"
    print(f"{path}: {what}")
    return 0
