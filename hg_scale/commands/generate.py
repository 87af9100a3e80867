"""Generate text or images with a trained model."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from hg_scale.arguments import add_model_options, local_path
from hg_scale.commands.user_errors import refuse_unwritable, report_out_of_memory
from hg_scale.errors import UserError

if TYPE_CHECKING:
    from hg_scale.evaluation.generation import GenerationConfig, TextChunk
    from hg_scale.evaluation.loaded_model import LoadedModel

HELP = "generate text after a prompt, or images, with a trained model"

TOKENS = 500
KEEP = 0.5  # default share of an image that is kept when completing it
MAX_IMAGES = 256  # per PNG
_HEADING = 60  # characters of a prompt shown as the heading of its text


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_options(parser)
    add("--prompt", action="append", metavar="TEXT",
        help="text to continue; repeatable (default: start a new document)")  # fmt: skip
    add("--prompts", type=local_path, metavar="FILE",
        help="file with one prompt per line; an empty line starts a new document")  # fmt: skip
    add("--tokens", type=int, metavar="N", help=f"tokens per text at most (default: {TOKENS})")
    add("--temperature", type=float, default=0.8, metavar="T",
        help="sampling temperature; 0: greedy, 1: the model's distribution (default: "
        "0.8)")  # fmt: skip
    add("--top-k", type=int, metavar="K", help="sample from the K most likely tokens only")
    add("--top-p", type=float, default=1.0, metavar="P",
        help="sample from the fewest tokens with total probability P (default: 1)")  # fmt: skip
    add("--seed", type=int, default=1, help="the same seed gives the same output (default: 1)")
    add("--count", type=int, default=None, metavar="N",
        help="texts per prompt or completions per image (default: 1), or new images "
        "(default: 16)")  # fmt: skip
    add("--batch", type=int, default=16, metavar="N",
        help="texts or images generated at a time (default: 16)")  # fmt: skip
    add("--context", type=int, metavar="N",
        help="tokens the model attends to; when full, generation continues from the last half "
        "(default: the training sequence length)")  # fmt: skip
    add("--complete", type=local_path, nargs="+", metavar="IMAGE",
        help="images (.png, .jpg, .npy, .npz) whose lower part to generate; at most "
        f"{MAX_IMAGES}")  # fmt: skip
    add("--keep", type=float, metavar="SHARE",
        help=f"share of an image that --complete keeps (default: {KEEP})")  # fmt: skip
    add("--output", type=local_path, metavar="FILE",
        help="text: also write JSON lines here; images: the PNG (default: "
        "samples.png)")  # fmt: skip
    add("--data", metavar="SHARDS", help="prepared corpus (default: the run's)")


@report_out_of_memory()
def run(options: argparse.Namespace) -> int:
    _check(options)

    from hg_scale.evaluation.generation import GenerationConfig
    from hg_scale.evaluation.loaded_model import load
    from hg_scale.model.sampling import Sampling

    loaded = load(options.model, options.data, options.precision)
    config = GenerationConfig(
        Sampling(options.temperature, options.top_k, options.top_p),
        options.tokens or TOKENS, options.seed, options.batch, options.context,
    )  # fmt: skip
    shape, source = loaded.image_shape, loaded.data_source
    if shape is None:
        if options.complete:
            raise UserError(f"--complete is for images; {source} contains text: use --prompt")
        if options.output:
            refuse_unwritable(options.output)
        return _generate_text(loaded, _read_prompts(options), config, options.output)
    if options.prompt or options.prompts:
        raise UserError(f"--prompt is for text; {source} contains images: use --complete")
    if options.tokens is not None:
        raise UserError(f"--tokens is for text; {source} contains images of a fixed size")
    return _generate_images(loaded, shape, config, options)


def _check(options: argparse.Namespace) -> None:
    """Raise UserError for options that are out of range or contradict each other."""
    problems = {
        "--tokens: expected 1 or more": options.tokens is not None and options.tokens < 1,
        "--count: expected 1 or more": options.count is not None and options.count < 1,
        "--batch: expected 1 or more": options.batch < 1,
        "--context: expected 2 or more": options.context is not None and options.context < 2,
        "--temperature: expected 0 or more": not 0 <= options.temperature < float("inf"),
        "--top-k: expected 1 or more": options.top_k is not None and options.top_k < 1,
        "--top-p: expected a number above 0, up to 1": not 0 < options.top_p <= 1,
        "--keep: expected a number from 0 to below 1": options.keep is not None
        and not 0 <= options.keep < 1,
        "--keep: needs --complete": options.keep is not None and not options.complete,
        "--prompt and --prompts: give only one of them": bool(options.prompt and options.prompts),
    }
    for problem, found in problems.items():
        if found:
            raise UserError(problem)


def _read_prompts(options: argparse.Namespace) -> list[bytes]:
    """Return the prompts, each --count times."""
    prompts = [os.fsencode(text) for text in options.prompt or [""]]
    if options.prompts:
        prompts = _prompt_file(options.prompts).splitlines()
        if not prompts:
            raise UserError(f"{options.prompts}: is empty; expected one prompt per line")
    return [prompt for prompt in prompts for _ in range(options.count or 1)]


def _prompt_file(path: Path) -> bytes:
    """Return the text of a file, which may be compressed, or of a pipe."""
    from hg_scale.data.preparation.file_format import inspect_files
    from hg_scale.data.preparation.sources import read_blocks

    if path.is_file():
        inspect_files([path], only_text=True, option=False)
        return b"".join(read_blocks(path))
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _generate_text(
    loaded: LoadedModel, prompts: list[bytes], config: GenerationConfig, output: Path | None
) -> int:
    """Stream each prompt and its continuation to stdout, one text after the other."""
    import json

    from hg_scale.evaluation.generation import generate_texts, in_prompt_order

    _ = loaded.tokenizer  # raises, where it is missing, before the output file is truncated
    readable = [prompt.decode(errors="replace") for prompt in prompts]
    text, row = "", -1
    with output.open("w") if output else nullcontext() as file:
        for chunk in in_prompt_order(generate_texts(loaded, prompts, config)):
            try:
                _print_chunk(chunk, readable, first=chunk.row != row)
            except BrokenPipeError:  # stdout was closed, as by `| head`; the file is still written
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                if not file:
                    return 0
            text, row = chunk.text if chunk.row != row else text + chunk.text, chunk.row
            if file and chunk.last:  # write each line as soon as its text is complete
                file.write(json.dumps({"prompt": readable[row], "text": text}) + "\n")
                file.flush()
    return 0


def _print_chunk(chunk: TextChunk, prompts: list[str], first: bool) -> None:
    """Print a chunk, preceded by its prompt where it is the `first` of its text."""
    from hg_scale.data.inspection import printable

    out = sys.stdout
    if hasattr(out, "reconfigure"):
        out.reconfigure(errors="replace")
    if first:
        if len(prompts) > 1:
            head = " ".join(prompts[chunk.row].split())[:_HEADING]
            out.write(f"--- {chunk.row + 1} of {len(prompts)}: {printable(head)}\n")
        out.write(printable(prompts[chunk.row]))
    out.write(printable(chunk.text) + ("\n" if chunk.last else ""))
    out.flush()


def _generate_images(
    loaded: LoadedModel,
    shape: tuple[int, int, int],
    config: GenerationConfig,
    options: argparse.Namespace,
) -> int:
    """Write a square grid of new images; with --complete, one row per given image.

    Such a row is the kept part, the completions and the original, as in the paper's Figure 8.
    """
    import math

    import numpy as np
    from rich.console import Console
    from rich.progress import Progress

    from hg_scale.evaluation.generation import generate_images, mask_below
    from hg_scale.evaluation.pictures import read_images, write_grid

    path = options.output or Path("samples.png")
    refuse_unwritable(path)
    originals = read_images(options.complete or [], shape, MAX_IMAGES)
    count = options.count or (1 if originals else 16)
    keep = KEEP if options.keep is None else options.keep
    kept = math.floor(keep * shape[0]) if originals else 0  # rows of pixels
    prefixes = [image[:kept].reshape(-1) for image in originals for _ in range(count)]
    prefixes = prefixes or [np.empty(0, np.uint8)] * count
    images: list[np.ndarray] = [np.empty(0)] * len(prefixes)
    total = len(prefixes) * (math.prod(shape) - prefixes[0].size)
    terminal = Console(stderr=True)
    with Progress(console=terminal, transient=True, disable=not terminal.is_terminal) as progress:
        task = progress.add_task("generating", total=total)
        for row, image in generate_images(loaded, prefixes, config):
            progress.advance(task)
            if image is not None:
                images[row] = image
    if originals:
        grid = [
            [mask_below(original, kept), *images[i * count : (i + 1) * count], original]
            for i, original in enumerate(originals)
        ]
    else:
        side = math.ceil(math.sqrt(count))
        grid = [images[i : i + side] for i in range(0, count, side)]
    write_grid(path, grid)
    what = "kept part, completions, original" if originals else f"{count} images"
    print(f"{path}: {what}")
    return 0
