"""The evaluation of a trained model on a text, by one process or several."""

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
from hg_scale.data.protocol import Tokens, TokenText, WindowProtocol
from hg_scale.data.shards import SplitReader
from hg_scale.errors import UserError
from hg_scale.evaluation.loaded_model import LoadedModel, load
from hg_scale.evaluation.scoring import Losses, Score, score_windows


@dataclass(frozen=True)
class EvaluationTask:
    """What is to be scored, and how; small enough to be sent to a process.

    `data`: a prepared corpus, whose `split` (None: test) is scored, or a plain file; None: the
    corpus of the run. `length`: tokens in a window, None: as in training; `stride`: None, no
    context; `windows`: only so many.
    """

    model: Path
    data: str | None = None
    split: str | None = None
    length: int | None = None
    stride: int | None = None
    windows: int | None = None
    rows: int = 8
    precision: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True)
class EvaluationSubject:
    """A model and the text that it is scored on: `tokens` that stand for `bytes`.

    `bytes` is None for a part of a text: what its tokens stand for.
    """

    trained: LoadedModel
    text: TokenText
    name: str
    tokens: int
    bytes: int | None
    how: WindowProtocol
    begin: int
    images: bool

    @property
    def windows(self) -> int:
        return self.how.count(self.tokens)


def open_subject(task: EvaluationTask, device: str | None = None) -> EvaluationSubject:
    """The model and the text of a task. Raises UserError where they do not fit each other."""
    plain = _plain_file(task)
    trained = load(task.model, None if plain else task.data, task.precision, device)
    length = task.length or trained.model.config.sequence_length
    how = WindowProtocol(length, task.stride or length)
    images = False
    text: TokenText
    if plain:
        if trained.images is not None:
            raise UserError(f"{plain}: a plain file is scored as text, but {trained.subject} holds "
                            "images: name a prepared corpus with --data")  # fmt: skip
        raw, tokenizer = plain.read_bytes(), trained.open_tokenizer()
        size: int | None = len(raw)
        ids = tokenizer.encode(raw)
        text, tokens = Tokens(ids), len(ids)
        name, begin = str(plain), tokenizer.eod or 0
        if not tokens:
            raise UserError(f"{plain}: is empty")
    else:
        index = trained.index
        if index is None:
            why = "an export names no data" if is_export(task.model) else "its data is not there"
            raise UserError(f"{task.model}: {why}; give --data SHARDS or FILE")
        split = task.split or "test"
        text, tokens = SplitReader(index, split), index.split(split).tokens
        size = split_bytes(index, split)
        name, begin = f"{split} split of {index.location}", index.eod or 0
        images = trained.images is not None
        if images and (how.length, how.stride) != (index.document_tokens,) * 2:
            raise UserError(
                f"{index.location}: an image is {index.document_tokens} tokens, and is scored on "
                "its own: leave --context, --window and --stride out"
            )
    if task.windows is not None:
        part = how.length + (task.windows - 1) * how.stride
        if part < tokens:
            tokens, size = part, None
    return EvaluationSubject(trained, text, name, tokens, size, how, begin, images)


def _plain_file(task: EvaluationTask) -> Path | None:
    """The text file that a task names; None where it names a prepared corpus, or nothing."""
    path = Path(task.data or "")
    if task.data and is_local(task.data) and not path.exists():
        raise UserError(
            f"--data {path}: no such file or folder; name a text file or a prepared corpus"
        )
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"--data {path}: a pipe or a device; it has to be a file that stays")
    if not path.is_file() or path.name == INDEX_FILE:
        return None
    if path.suffix == ".tar":
        raise UserError(f"{path}: a shard is no text; name its folder, and the split with --split")
    if task.split is not None:
        raise UserError(f"--split: {path} is a plain file and has no {task.split!r} split")
    return path


def evaluate(
    task: EvaluationTask,
    processes: int = 1,
    advance: Callable[[int, int], object] = lambda tokens, of: None,
) -> tuple[EvaluationSubject, Score]:
    """Score a task; each of several processes takes consecutive windows.

    `advance` is told the tokens just scored, and of how many in all; first 0. The
    result does not depend on the number of processes, beyond rounding. Raises UserError, here, for
    what any process meets.
    """
    subject = open_subject(task, "cpu" if processes > 1 else None)
    processes = min(processes, subject.windows)

    def told(tokens: int) -> None:
        advance(tokens, subject.tokens)

    told(0)
    if processes == 1:
        losses = _share(subject, task.rows, 0, 1, told)
    else:
        losses = _spread(task, processes, told)
    size = int(losses.bytes.sum()) if subject.bytes is None else subject.bytes
    return subject, Score(losses, size)


def _share(
    subject: EvaluationSubject, rows: int, rank: int, size: int, advance: Callable[[int], object]
) -> Losses:
    """Losses of the `rank`-th of `size` equal parts."""
    ends = np.linspace(0, subject.windows, size + 1).round().astype(int)
    return score_windows(
        subject.trained.model, subject.text, subject.tokens, subject.how, rows=rows,
        begin=subject.begin, separate=subject.images, first=int(ends[rank]),
        last=int(ends[rank + 1]), count_bytes=subject.trained.open_tokenizer().count_bytes,
        advance=advance,
    )  # fmt: skip


def _spread(task: EvaluationTask, processes: int, advance: Callable[[int], object]) -> Losses:
    context = mp.get_context("spawn")
    results: Any = context.Queue()
    workers = [
        context.Process(target=_work, args=(task, rank, processes, results), daemon=True)
        for rank in range(processes)
    ]
    parts: dict[int, Losses] = {}
    try:
        # Ctrl-C reaches every process of the terminal's group; it is for this one to end them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for worker in workers:  # each inherits the mask
                worker.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while len(parts) < processes:
            try:
                rank, kind, value = results.get(timeout=5)
            except Empty:
                dead = [i for i, w in enumerate(workers) if not w.is_alive() and i not in parts]
                if dead and results.empty():
                    code = workers[dead[0]].exitcode
                    raise UserError(
                        f"process {dead[0]} of the evaluation died (exit code {code}); with too "
                        "little memory, use fewer --processes or a smaller --batch"
                    ) from None
                continue
            if kind == "fault":
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


def _work(task: EvaluationTask, rank: int, size: int, results: Any) -> None:
    """One process: on a GPU of its own where there are several, else on its share of the cores."""
    device = None
    if torch.cuda.is_available():
        device = f"cuda:{rank % torch.cuda.device_count()}"
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    try:
        subject = open_subject(task, device)
        told = _share(subject, task.rows, rank, size, lambda n: results.put((rank, "tokens", n)))
        results.put((rank, "losses", told))
    except UserError as error:
        results.put((rank, "fault", str(error)))
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        results.put((rank, "fault", f"process {rank} of the evaluation failed: {why}"))
    results.close()
    results.join_thread()
