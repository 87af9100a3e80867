"""Evaluation of a trained model on a text, in one process or several."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any, Literal

import numpy as np
import torch
import torch.multiprocessing as mp

from hg_scale.convert.open import is_export
from hg_scale.data.evaluation import split_bytes
from hg_scale.data.index import INDEX_FILE, is_local
from hg_scale.data.protocol import FirstToken, SlidingWindows, Tokens, TokenSequence
from hg_scale.data.shards import SplitReader
from hg_scale.errors import UserError
from hg_scale.evaluation.loaded_model import LoadedModel, load
from hg_scale.evaluation.scoring import Losses, Score, score_windows
from hg_scale.evaluation.text_file import TextFile


@dataclass(frozen=True)
class EvaluationTask:
    """What to score and how; small, since it is pickled for worker processes.

    `data`: a prepared corpus, of which `split` (None: test) is scored, or a file (`TextFile` says
    what `field` and `as_they_are` mean); None: the corpus of the run. `length`: tokens per window
    (None: as in training). `stride`: tokens between windows (None: `length`, no overlap).
    `windows`: score the first so many only. `first_token`: the first input of each window: the
    token before it, or always id 0 as in the authors' code.
    """

    model: Path
    data: str | None = None
    split: str | None = None
    length: int | None = None
    stride: int | None = None
    windows: int | None = None
    batch_size: int = 8
    precision: Literal["fp32", "bf16"] = "fp32"
    first_token: FirstToken = "previous"
    field: str = "text"
    as_they_are: bool = False


@dataclass(frozen=True)
class EvaluationSetup:
    """A loaded model, the text to score it on, `tokens` long, and the windows to score.

    `bytes` is the length of the text in bytes; None where only its first tokens are scored.
    `start_token` precedes the text, and every window where windows are separate.
    """

    loaded: LoadedModel
    text: TokenSequence
    text_name: str
    tokens: int
    bytes: int | None
    protocol: SlidingWindows
    start_token: int
    images: bool
    first_token: FirstToken

    @property
    def separate(self) -> bool:
        """Whether no window sees the token before it."""
        return self.images or self.first_token == "zero"

    @property
    def windows(self) -> int:
        """Number of windows to score."""
        return self.protocol.count(self.tokens)


def prepare_evaluation(task: EvaluationTask, device: str | None = None) -> EvaluationSetup:
    """Load the model and open the text of a task. Raises UserError where they do not fit."""
    plain = _plain_file(task)
    loaded = load(task.model, None if plain else task.data, task.precision, device)
    length = task.length or loaded.config.sequence_length
    protocol = SlidingWindows(length, task.stride or length)
    images = False
    text: TokenSequence
    if plain:
        if loaded.image_shape is not None:
            raise UserError(f"{plain}: a plain file is scored as text, but {loaded.data_source} "
                            "contains images: name a prepared corpus with --data")  # fmt: skip
        tokenizer = loaded.tokenizer
        size: int | None
        ids, size = TextFile(plain, task.field, task.as_they_are).encode(tokenizer)
        text, tokens = Tokens(ids), len(ids)
        name, start_token = str(plain), tokenizer.eod or 0
    else:
        if task.as_they_are:
            raise UserError("--bytes-as-they-are: needs --data FILE, not a prepared corpus")
        index = loaded.index
        if index is None:
            why = "an export names no data" if is_export(task.model) else "its data is missing"
            raise UserError(f"{task.model}: {why}; give --data SHARDS or FILE")
        split = task.split or "test"
        text, tokens = SplitReader(index, split), index.split(split).tokens
        size = split_bytes(index, split)
        name, start_token = f"{split} split of {index.shown}", index.eod or 0
        images = loaded.image_shape is not None
        if images and (protocol.length, protocol.stride) != (index.document_tokens,) * 2:
            raise UserError(
                f"{index.shown}: an image is {index.document_tokens} tokens, and is scored on "
                "its own: omit --context, --window and --stride"
            )
    if task.windows is not None:
        limit = protocol.length + (task.windows - 1) * protocol.stride
        if limit < tokens:
            tokens, size = limit, None
    if task.first_token == "zero":
        start_token = 0
    return EvaluationSetup(
        loaded, text, name, tokens, size, protocol, start_token, images, task.first_token
    )


def _plain_file(task: EvaluationTask) -> Path | None:
    """Return the text file that a task names; None for a prepared corpus or the run's own."""
    path = Path(task.data or "")
    if task.data and is_local(task.data) and not path.exists():
        raise UserError(
            f"--data {path}: no such file or folder; name a text file or a prepared corpus"
        )
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"--data {path}: a pipe or a device; expected a regular file")
    if not path.is_file() or path.name == INDEX_FILE:
        return None
    if path.suffix == ".tar":
        raise UserError(
            f"{path}: a shard, not a text file; name its folder, and the split with --split"
        )
    if task.split is not None:
        raise UserError(f"--split: {path} is a plain file and has no {task.split!r} split")
    return path


def evaluate(
    task: EvaluationTask,
    processes: int = 1,
    advance: Callable[[int, int], object] = lambda tokens, total: None,
) -> tuple[EvaluationSetup, Score]:
    """Score a task; with several processes each scores a range of consecutive windows.

    `advance(tokens, total)` is called with the tokens just scored, first 0, and those of the whole
    text. The result does not depend on `processes` beyond rounding. An error in any process is
    raised here, as UserError.
    """
    setup = prepare_evaluation(task, "cpu" if processes > 1 else None)
    processes = min(processes, setup.windows)

    def report(tokens: int) -> None:
        advance(tokens, setup.tokens)

    report(0)
    if processes == 1:
        losses = _score_share(setup, task.batch_size, 0, 1, report)
    else:
        losses = _score_in_processes(task, processes, report)
    size = int(losses.bytes.sum()) if setup.bytes is None else setup.bytes
    return setup, Score(losses, size)


def _score_share(
    setup: EvaluationSetup,
    batch_size: int,
    rank: int,
    size: int,
    advance: Callable[[int], object],
) -> Losses:
    """Score the windows of rank `rank` of `size`."""
    edges = np.linspace(0, setup.windows, size + 1).round().astype(int)
    return score_windows(
        setup.loaded.model, setup.text, setup.tokens, setup.protocol, batch_size=batch_size,
        start_token=setup.start_token, separate=setup.separate, first=int(edges[rank]),
        last=int(edges[rank + 1]), count_bytes=setup.loaded.tokenizer.count_bytes,
        advance=advance,
    )  # fmt: skip


def _score_in_processes(
    task: EvaluationTask, processes: int, advance: Callable[[int], object]
) -> Losses:
    """Score a task in worker processes and join their losses."""
    context = mp.get_context("spawn")
    results: Any = context.Queue()
    workers = [
        context.Process(target=_worker, args=(task, rank, processes, results), daemon=True)
        for rank in range(processes)
    ]
    parts: dict[int, Losses] = {}
    try:
        # Ctrl-C reaches every process of the terminal's group; this one ends the workers.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for worker in workers:  # they inherit the mask
                worker.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        while len(parts) < processes:
            try:
                rank, kind, value = results.get(timeout=5)
            except Empty:
                dead = [i for i, w in enumerate(workers) if not w.is_alive() and i not in parts]
                if dead and results.empty():
                    code = workers[dead[0]].exitcode
                    raise UserError(
                        f"process {dead[0]} of the evaluation died (exit code {code}); if it ran "
                        "out of memory, use fewer --processes or a smaller --batch"
                    ) from None
                continue
            if kind == "error":
                raise UserError(value)
            if kind == "tokens":
                advance(value)
            else:
                parts[rank] = value
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join()
    return Losses.joined([parts[rank] for rank in range(processes)])


def _worker(task: EvaluationTask, rank: int, size: int, results: Any) -> None:
    """Score one share in a worker process: on its own GPU, or on its share of the CPU cores."""
    device = None
    if torch.cuda.is_available():
        device = f"cuda:{rank % torch.cuda.device_count()}"
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    try:
        setup = prepare_evaluation(task, device)
        losses = _score_share(
            setup, task.batch_size, rank, size, lambda n: results.put((rank, "tokens", n))
        )
        results.put((rank, "losses", losses))
    except UserError as error:
        results.put((rank, "error", str(error)))
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        results.put((rank, "error", f"process {rank} of the evaluation failed: {why}"))
    results.close()
    results.join_thread()
