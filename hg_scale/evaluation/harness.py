"""Adapter from a trained model to EleutherAI's lm-evaluation-harness (`lm_eval`).

Only this module and commands/harness.py import `lm_eval`.
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
from hg_scale.evaluation.generation import GenerationConfig, generate_from_ids
from hg_scale.evaluation.loaded_model import LoadedModel
from hg_scale.model.sampling import Sampling

MAX_NEW_TOKENS = 256  # where a task sets no max_gen_toks


class HarnessModel(LM):
    """Likelihoods and generated texts of a loaded model, in windows of its sequence length.

    Every text starts a document. A continuation is scored with as much context as fits into one
    window; a whole text longer than a window is scored in consecutive windows. `batch_size`
    windows are scored at a time; texts are generated one at a time.
    """

    def __init__(self, loaded: LoadedModel, batch_size: int = 8) -> None:
        super().__init__()
        if loaded.image_shape is not None:
            raise UserError(f"{loaded.data_source}: contains images; lm-eval tasks need text")
        self.loaded, self._batch_size = loaded, batch_size
        self.tokenizer = loaded.tokenizer
        self.start = self.tokenizer.eod or 0
        self.length = loaded.config.sequence_length
        self._device = loaded.device

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without a start token."""
        return list(self.tokenizer.encode(text.encode()).tolist())

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(context, continuation) -> (log-likelihood in nats, whether it is the greedy output)."""
        pairs = []
        for context, continuation in (request.args for request in requests):
            # As in lm-eval's own models, white space between them belongs to the continuation,
            # whose tokens would include it.
            head, full = self.encode(context.rstrip()), self.encode(context + continuation)
            pairs.append(([self.start, *full[: len(head)]], full[len(head) :]))
        results: list[tuple[float, bool]] = []
        for windows in self._score(pairs):
            results.append((sum(nats for nats, _ in windows), all(best for _, best in windows)))
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """(text,) -> its log-likelihood in nats, each token counted once."""
        pairs = [([self.start], self.encode(request.args[0])) for request in requests]
        return [sum(nats for nats, _ in windows) for windows in self._score(pairs)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """(context, options) -> generated text, up to a string of `until` or `max_gen_toks`."""
        return [
            self._generate(*request.args)
            for request in track(requests, "generating", transient=True, disable=len(requests) < 8)
        ]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        sampled = options.get("do_sample", False) and options.get("temperature", 0) > 0
        sampling = Sampling(
            options.get("temperature", 1.0) if sampled else 0.0,
            options.get("top_k") if sampled else None,
            options.get("top_p", 1.0) if sampled else 1.0,
        )
        limit = int(options.get("max_gen_toks", MAX_NEW_TOKENS))
        # Keep the end of a long context, so that the answer fits into the window (as lm-eval's own
        # models do; they refuse an answer as long as the window, which here gets half of it).
        kept = self.length - limit if limit < self.length else max(1, self.length // 2)
        ids = [self.start, *self.encode(context)][-kept:]
        text = ""
        for chunk in generate_from_ids(self.loaded, [ids], GenerationConfig(sampling, limit)):
            text += chunk.text
            ends = [start for stop in stops if (start := text.find(stop)) >= 0]
            if ends:
                return text[: min(ends)]
        return text

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]]
    ) -> Iterable[list[tuple[float, bool]]]:
        """Score (context, continuation) ids: the results of the windows of each pair."""
        windows: list[tuple[int, list[int], list[int]]] = []
        for number, (context, continuation) in enumerate(pairs):
            windows += [(number, *window) for window in self._windows(context, continuation)]
        # Sorted by length for little padding, the longest first so that memory peaks at once.
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i][1]))
        by_pair: list[list[tuple[float, bool]]] = [[] for _ in pairs]
        size = self._batch_size
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        for batch in track(batches, "scoring", transient=True, disable=len(batches) < 8):
            results = self._score_batch([windows[i][1:] for i in batch])
            for i, result in zip(batch, results, strict=True):
                by_pair[windows[i][0]].append(result)
        return by_pair

    def _windows(
        self, context: list[int], continuation: list[int]
    ) -> Iterable[tuple[list[int], list[int]]]:
        """Yield (inputs, labels of the last inputs), each at most a sequence length long."""
        if len(continuation) <= self.length:
            if continuation:
                inputs = (context + continuation)[:-1][-self.length :]
                yield inputs, continuation
            return
        for pair in get_rolling_token_windows(continuation, context[-1], self.length, 1):
            inputs, labels = make_disjoint_window(pair)
            yield [*inputs, *labels[:-1]], labels

    @torch.inference_mode()
    def _score_batch(
        self, windows: Sequence[tuple[list[int], list[int]]]
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy) per window; padded on the right, which causality masks."""
        longest = max(len(inputs) for inputs, _ in windows)
        ids = np.full((len(windows), longest), self.start, np.int64)
        for row, (inputs, _) in enumerate(windows):
            ids[row, : len(inputs)] = inputs
        logits: Tensor = self.loaded.model(torch.from_numpy(ids).to(self._device)).float()
        logits = logits[..., : self.tokenizer.vocab_size]
        results = []
        for row, (inputs, labels) in enumerate(windows):
            log_probs = logits[row, len(inputs) - len(labels) : len(inputs)].log_softmax(-1)
            targets = torch.tensor(labels, device=self._device)
            nats = log_probs.gather(1, targets[:, None]).double().sum()
            results.append((float(nats), bool((log_probs.argmax(-1) == targets).all())))
        return results
