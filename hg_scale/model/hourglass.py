"""The Hourglass language model: a flat list of layers, built from the plan, run in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hg_scale.config.constants import DEFAULT_SEED
from hg_scale.config.schema import ModelConfig
from hg_scale.model.attention import PositionBias
from hg_scale.model.block import Activations, Embedding, Head, Layer, Norm, TransformerBlock
from hg_scale.model.context import Context, Dropout, name_seed
from hg_scale.model.initialization import initialize_weights
from hg_scale.model.layers import PlainLayers
from hg_scale.model.plan import LayerPlan, layer_plan, model_levels
from hg_scale.model.resampling import Shorten, Upsample


def make_shared_bias(model: ModelConfig, layers: PlainLayers) -> PositionBias | None:
    """Make the one pair of position biases of a model with `shared_position_bias`."""
    if not model.shared_position_bias:
        return None
    level = next(s for s in model_levels(model) if s.positions == "relative")
    return PositionBias(layers, level.heads, level.d_model // level.heads)


def make_layer(
    plan: LayerPlan,
    model: ModelConfig,
    layers: PlainLayers,
    shared_bias: PositionBias | None = None,
    recompute: bool = False,
) -> Layer:
    """Make the module of one entry of the layer list."""
    levels = model_levels(model)
    level = levels[plan.level]
    makers: dict[str, Callable[[], Layer]] = {
        "embedding": lambda: Embedding(model, layers, level),
        "block": lambda: TransformerBlock(model, layers, level, shared_bias, recompute),
        "norm": lambda: Norm(model, level),
        "shorten": lambda: Shorten(model, layers, level, levels[plan.level + 1], shared_bias),
        "upsample": lambda: Upsample(model, layers, level, levels[plan.level + 1], shared_bias),
        "head": lambda: Head(model, layers, level),
    }
    layer = makers[plan.kind]()
    for name, module in layer.named_modules():
        if isinstance(module, Dropout):
            module.site = name_seed(0, f"{plan.name}.{name}")
    return layer


class Hourglass(nn.Module):
    """The complete model on one device, or one tensor-parallel slice of it.

    `layers`: the layers factory; default: plain torch. `recompute`: by level, whether blocks are
    recomputed in the backward pass. `seed`: of the initial weights; None leaves them
    uninitialised, to be loaded.

    Parameters are named after the plan: `pre.0.attention.qkv.weight`, `level0.shorten.pool.bias`.
    `sequence` lists the layers in the order of the plan.
    """

    def __init__(
        self,
        model: ModelConfig,
        layers: PlainLayers | None = None,
        recompute: list[bool] | None = None,
        *,
        seed: int | None = DEFAULT_SEED,
    ) -> None:
        super().__init__()
        _require_model_config(model)
        self.config, self.parts = model, layers or PlainLayers()
        self.position_bias = make_shared_bias(model, self.parts)
        self.sequence: list[Layer] = []
        for plan in layer_plan(model):
            again = bool(recompute and recompute[plan.level])
            layer = make_layer(plan, model, self.parts, self.position_bias, again)
            attach(self, plan.name, layer)
            self.sequence.append(layer)
        if seed is not None:
            initialize_weights(self.named_parameters(), model, seed)

    def forward(
        self, ids: Tensor, labels: Tensor | None = None, context: Context | None = None
    ) -> Tensor:
        """Return the logits of ids (B, L): (B, L, padded vocabulary / tensor ranks), for any L.

        The caller has shifted the ids: position t holds the token before the one it predicts.
        With labels (B, L), -1 where a position is ignored, return the mean loss in nats over all
        B x L positions instead.
        """
        context = context or Context(self.config.parsed.factors)
        state = Activations(ids)
        for layer in self.sequence:
            state = layer(state, context)
        return state.x if labels is None else mean_loss(self.parts, state.x, labels)


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of the unsharded model, by name, in the model's order."""
    with torch.device("meta"):
        hourglass = Hourglass(model, seed=None)
    return {name: tuple(p.shape) for name, p in hourglass.named_parameters()}


def _require_model_config(model: Any) -> None:
    """Raise for mistakes that are easily made where no configuration file was checked."""
    if type(model).__name__ != "ModelConfig":  # by name: an exported bundle has its own class
        hint = "; pass its `model` section" if hasattr(model, "model") else ""
        raise TypeError(f"Hourglass: expected a ModelConfig, got a {type(model).__name__}{hint}")
    for level in model_levels(model):
        if level.d_model % level.heads:
            raise ValueError(
                f"Hourglass: d_model {level.d_model} of level {level.index} is not divisible by "
                f"its {level.heads} heads"
            )


def mean_loss(layers: PlainLayers, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the losses over B x L.

    The divisor is constant, so that the loss does not depend on the split into micro-batches.
    """
    return layers.cross_entropy(logits, labels).sum() / labels.numel()


def attach(root: nn.Module, name: str, module: nn.Module) -> None:
    """Register `module` under a dotted name, creating the containers in between."""
    *parents, last = name.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)
