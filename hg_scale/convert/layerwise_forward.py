"""Compute logits with one layer in memory at a time, for models larger than memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.jobs import ProgressReporter
from hg_scale.config.schema import ModelConfig
from hg_scale.convert.source import WeightSource
from hg_scale.model.block import Activations
from hg_scale.model.context import Context
from hg_scale.model.hourglass import Hourglass
from hg_scale.model.plan import layer_plan

BOUND = 1e-5  # largest difference of fp32 logits, as for the golden files
_BATCH, _LENGTH = 2, 128


def fixed_batch(model: ModelConfig) -> Tensor:
    """Return random ids (2, at most 128), the same on each call for a model."""
    length = min(_LENGTH, model.sequence_length)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.vocab_size, (_BATCH, length), generator=generator)


@torch.inference_mode()
def layerwise_logits(source: WeightSource, ids: Tensor, report: ProgressReporter) -> Tensor:
    """Map ids (B, L) to fp32 logits (B, L, vocabulary) with the weights of a source."""
    model = source.model
    with torch.device("meta"):
        hourglass = Hourglass(model, seed=None)
    if hourglass.position_bias is not None:
        _load_weights(hourglass.position_bias, "position_bias", source)
    state, context = Activations(ids), Context(model.parsed.factors)
    for plan in layer_plan(model):
        layer = hourglass.get_submodule(plan.name)
        _load_weights(layer, plan.name, source)
        state = layer(state, context)
        report.advance(sum(p.numel() for p in layer.parameters()) * 4)
        layer.to("meta")  # frees its weights
    return state.x[..., : model.vocab_size]


def largest_difference(a: WeightSource, b: WeightSource, report: ProgressReporter) -> float:
    """Return the largest difference of two sources' fp32 logits on `fixed_batch`.

    Raises CheckpointError if it is not finite.
    """
    ids = fixed_batch(a.model)
    report.begin("comparing logits", 4 * (a.parameters + b.parameters))
    difference = (layerwise_logits(a, ids, report) - layerwise_logits(b, ids, report)).abs().max()
    if not difference.isfinite():
        raise CheckpointError(
            f"{a.path}: its logits are not finite; see hg-scale convert verify {a.path}"
        )
    return float(difference)


def _load_weights(module: nn.Module, name: str, source: WeightSource) -> None:
    weights = {key: source.full_tensor(f"{name}.{key}") for key, _ in module.named_parameters()}
    module.load_state_dict(weights, assign=True)
