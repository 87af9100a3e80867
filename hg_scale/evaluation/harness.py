"""A trained model for the field's harness (lm-eval), which wants likelihoods of texts and texts.

Only this file and its verb import `lm_eval`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.progress import track
from torch import Tensor

from hg_scale.errors import UserError
from hg_scale.evaluation.generation import GenerationConfig, write_after
from hg_scale.evaluation.loaded_model import LoadedModel
from hg_scale.model.sampling import Sampling

MOST_TOKENS = 256  # that a task's answer may have where the task does not say


class HarnessModel(LM):
    """Likelihoods and greedy texts of `trained`, in windows of its training length.

    A text begins where a document does. What is longer than a window is seen in its last window:
    of a continuation, as much context as fits; a whole text in windows that follow each other.
    `rows` windows are scored at once; texts are written one at a time.
    """

    def __init__(self, trained: LoadedModel, rows: int = 8) -> None:
        super().__init__()
        if trained.images is not None:
            raise UserError(f"{trained.subject}: holds images; the harness asks for text")
        self.trained, self.rows = trained, rows
        self.tokenizer = trained.open_tokenizer()
        self.start = self.tokenizer.eod or 0
        self.length = trained.model.config.sequence_length
        self._device = next(trained.model.parameters()).device

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text.encode()).tolist())

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(context, continuation) -> (log-likelihood in nats, whether greedy decoding gives it)."""
        todo = []
        for context, continuation in (request.args for request in requests):
            # White space between belongs to the continuation, whose pieces would begin with it (as
            # in the harness's own models).
            head, whole = self.encode(context.rstrip()), self.encode(context + continuation)
            todo.append(([self.start, *whole[: len(head)]], whole[len(head) :]))
        results: list[tuple[float, bool]] = []
        for windows in self._scored(todo):
            results.append((sum(nats for nats, _ in windows), all(same for _, same in windows)))
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """(text,) -> its log-likelihood in nats, each token counted once."""
        todo = [([self.start], self.encode(request.args[0])) for request in requests]
        return [sum(nats for nats, _ in windows) for windows in self._scored(todo)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """(context, options) -> what follows, up to one of `until` or to `max_gen_toks` tokens."""
        return [
            self._write(*request.args)
            for request in track(requests, "generating", transient=True, disable=len(requests) < 8)
        ]

    def _write(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        sampled = options.get("do_sample", False) and options.get("temperature", 0) > 0
        sampling = Sampling(
            options.get("temperature", 1.0) if sampled else 0.0,
            options.get("top_k") if sampled else None,
            options.get("top_p", 1.0) if sampled else 1.0,
        )
        most = int(options.get("max_gen_toks", MOST_TOKENS))
        # Of a long context the end, so that the answer has room in the window (as in the harness's
        # own models; they refuse an answer as long as the window, which here gets half of one).
        kept = self.length - most if most < self.length else max(1, self.length // 2)
        ids = [self.start, *self.encode(context)][-kept:]
        text = ""
        for piece in write_after(self.trained, [ids], GenerationConfig(sampling, most)):
            text += piece.text
            ends = [place for stop in stops if (place := text.find(stop)) >= 0]
            if ends:
                return text[: min(ends)]
        return text

    def _scored(
        self, todo: Sequence[tuple[list[int], list[int]]]
    ) -> Iterable[list[tuple[float, bool]]]:
        """For each (context, continuation) in ids, the results of the windows it takes."""
        windows: list[tuple[int, list[int], list[int]]] = []
        for number, (context, continuation) in enumerate(todo):
            windows += [(number, *window) for window in self._windows(context, continuation)]
        # Rows of like length together, the longest first: little padding, memory known at once.
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i][1]))
        found: list[list[tuple[float, bool]]] = [[] for _ in todo]
        batches = [order[i : i + self.rows] for i in range(0, len(order), self.rows)]
        for batch in track(batches, "scoring", transient=True, disable=len(batches) < 8):
            results = self._batch([windows[i][1:] for i in batch])
            for i, result in zip(batch, results, strict=True):
                found[windows[i][0]].append(result)
        return found

    def _windows(
        self, context: list[int], continuation: list[int]
    ) -> Iterable[tuple[list[int], list[int]]]:
        """(inputs, labels at their end) of at most the training length each."""
        if len(continuation) <= self.length:
            if continuation:
                inputs = (context + continuation)[:-1][-self.length :]
                yield inputs, continuation
            return
        for pair in get_rolling_token_windows(continuation, context[-1], self.length, 1):
            inputs, labels = make_disjoint_window(pair)
            yield [*inputs, *labels[:-1]], labels

    @torch.inference_mode()
    def _batch(self, windows: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Padded on the right, where causality keeps it out of what is counted."""
        longest = max(len(inputs) for inputs, _ in windows)
        ids = np.full((len(windows), longest), self.start, np.int64)
        for row, (inputs, _) in enumerate(windows):
            ids[row, : len(inputs)] = inputs
        logits: Tensor = self.trained.model(torch.from_numpy(ids).to(self._device)).float()
        logits = logits[..., : self.tokenizer.vocab_size]
        results = []
        for row, (inputs, labels) in enumerate(windows):
            mine = logits[row, len(inputs) - len(labels) : len(inputs)].log_softmax(-1)
            wanted = torch.tensor(labels, device=self._device)
            nats = mine.gather(1, wanted[:, None]).double().sum()
            results.append((float(nats), bool((mine.argmax(-1) == wanted).all())))
        return results
