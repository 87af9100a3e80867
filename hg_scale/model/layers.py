"""The layers factory: the modules that tensor parallelism replaces, here in plain torch.

The model is written against this interface. `parallel/megatron.py` supplies Megatron's modules
with the same interface; parameters have the same names and layouts, so checkpoints fit both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hg_scale.config.constants import IGNORED_LABEL
from hg_scale.model.context import Dropout


class PlainLayers:
    """Unsharded layers on one device. `rank` and `size` are those of tensor parallelism."""

    rank, size = 0, 1

    def column(self, d_in: int, d_out: int, bias: bool) -> nn.Module:
        """Make a linear layer (..., d_in) -> (..., d_out / size), sharded by output features."""
        return nn.Linear(d_in, d_out, bias)

    def row(self, d_in: int, d_out: int, bias: bool) -> nn.Module:
        """Make a linear layer (..., d_in / size) -> (..., d_out), sharded by input features."""
        return nn.Linear(d_in, d_out, bias)

    def projection(self, d_in: int, d_out: int, bias: bool) -> nn.Module:
        """Make a linear layer (..., d_in) -> (..., d_out) with unsharded input and output.

        Its weight is sharded by input features.
        """
        return nn.Linear(d_in, d_out, bias)

    def embedding(self, vocab: int, d: int) -> nn.Module:
        """Make an embedding of ids (...) -> (..., d), sharded by vocabulary."""
        # Not nn.Embedding's own initial weights: on the meta device they import torch's compiler.
        return nn.Embedding.from_pretrained(torch.zeros(vocab, d), freeze=False)

    def by_head(self, heads: int, d_head: int, value: float) -> nn.Parameter:
        """Make a parameter (heads / size, d_head), sharded by heads like the activations."""
        return nn.Parameter(torch.full((heads, d_head), value))

    def dropout(self, rate: float, split_dim: int | None = None) -> Dropout:
        """Make a dropout; `split_dim`: the dimension along which its input is sharded, if any."""
        return Dropout(rate)

    def vocab_start(self, vocab: int) -> int:
        """Return the first id of this rank's slice of the logits."""
        return 0

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return fp32 losses (B, L) of logits (B, L, V / size) and labels (B, L).

        The loss is 0 where the label is IGNORED_LABEL.
        """
        losses = F.cross_entropy(
            logits.float().flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORED_LABEL,
            reduction="none",
        )
        return losses.view_as(labels)
