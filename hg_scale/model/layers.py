"""The layers factory: the parts that tensor parallelism replaces, here as plain torch.

The model is written against this interface. `parallel/megatron.py` supplies Megatron's modules
behind the same names; parameters are named and laid out alike, so a checkpoint fits both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hg_scale.config.constants import IGNORED_LABEL
from hg_scale.model.context import Dropout


class PlainLayers:
    """Whole layers on one device. `rank` and `size` are the tensor-parallel ones."""

    rank, size = 0, 1

    def column(self, d_in: int, d_out: int, bias: bool) -> nn.Module:
        """(..., d_in) -> (..., d_out / size): the output features are spread over the ranks."""
        return nn.Linear(d_in, d_out, bias)

    def row(self, d_in: int, d_out: int, bias: bool) -> nn.Module:
        """(..., d_in / size) -> (..., d_out): the input features are spread over the ranks."""
        return nn.Linear(d_in, d_out, bias)

    def projection(self, d_in: int, d_out: int, bias: bool) -> nn.Module:
        """(..., d_in) -> (..., d_out), whole on every rank; its weight is spread by input."""
        return nn.Linear(d_in, d_out, bias)

    def embedding(self, vocab: int, d: int) -> nn.Module:
        """ids (...) -> (..., d); its rows are spread over the ranks."""
        # Not nn.Embedding's own initial weights: on the meta device they import torch's compiler.
        return nn.Embedding.from_pretrained(torch.zeros(vocab, d), freeze=False)

    def by_head(self, heads: int, d_head: int, value: float) -> nn.Parameter:
        """A parameter (heads / size, d_head), spread by heads like the activations it meets."""
        return nn.Parameter(torch.full((heads, d_head), value))

    def dropout(self, rate: float, split_dim: int | None = None) -> Dropout:
        """Dropout; `split_dim` is the dimension of its input that the ranks share out, if any."""
        return Dropout(rate)

    def vocab_start(self, vocab: int) -> int:
        """The first id whose logit is held here."""
        return 0

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits (B, L, V / size), labels (B, L) -> fp32 losses (B, L); 0 where label is -1."""
        losses = F.cross_entropy(
            logits.float().flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORED_LABEL,
            reduction="none",
        )
        return losses.view_as(labels)
