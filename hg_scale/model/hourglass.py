"""The Hourglass language model: a flat list of layers, made from the plan, run in order."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from hg_scale.config.schema import ModelConfig
from hg_scale.model.attention import PositionBias
from hg_scale.model.block import Activations, Embedding, Head, Layer, Norm, TransformerBlock
from hg_scale.model.context import Context, Dropout, name_seed
from hg_scale.model.layers import PlainLayers
from hg_scale.model.plan import LayerPlan, layer_plan, model_levels
from hg_scale.model.resampling import Shorten, Upsample


def make_shared_bias(model: ModelConfig, layers: PlainLayers) -> PositionBias | None:
    """The one pair of position biases of a model with `shared_position_bias`."""
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
    """The module of one entry of the layer list."""
    levels = model_levels(model)
    here = levels[plan.level]
    makers: dict[str, Callable[[], Layer]] = {
        "embedding": lambda: Embedding(model, layers, here),
        "block": lambda: TransformerBlock(model, layers, here, shared_bias, recompute),
        "norm": lambda: Norm(model, here),
        "shorten": lambda: Shorten(model, layers, here, levels[plan.level + 1], shared_bias),
        "upsample": lambda: Upsample(model, layers, here, levels[plan.level + 1], shared_bias),
        "head": lambda: Head(model, layers, here),
    }
    layer = makers[plan.kind]()
    for name, module in layer.named_modules():
        if isinstance(module, Dropout):
            module.site = name_seed(0, f"{plan.name}.{name}")
    return layer


class Hourglass(nn.Module):
    """The whole model on one device (or one tensor slice of it).

    Parameters are named after the plan: `pre.0.attention.qkv.weight`, `level0.shorten.pool.bias`.
    `sequence`: the layers in the order of the plan.
    """

    def __init__(
        self,
        model: ModelConfig,
        layers: PlainLayers | None = None,
        recompute: list[bool] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.parts = model, layers or PlainLayers()
        self.position_bias = make_shared_bias(model, self.parts)
        self.sequence: list[Layer] = []
        for plan in layer_plan(model):
            again = bool(recompute and recompute[plan.level])
            layer = make_layer(plan, model, self.parts, self.position_bias, again)
            attach(self, plan.name, layer)
            self.sequence.append(layer)

    def forward(
        self, ids: Tensor, labels: Tensor | None = None, context: Context | None = None
    ) -> Tensor:
        """ids (B, L) -> logits (B, L, padded vocabulary / tensor ranks), any L.

        ids are shifted already: position t holds the token before the one it predicts. With
        labels (B, L), -1 where nothing is to be scored, the mean loss in nats over all B x L.
        """
        context = context or Context(self.config.parsed.factors)
        state = Activations(ids)
        for layer in self.sequence:
            state = layer(state, context)
        return state.x if labels is None else mean_loss(self.parts, state.x, labels)


def mean_loss(layers: PlainLayers, logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the losses over B x L: a constant divisor, so that any split into batches agrees."""
    return layers.cross_entropy(logits, labels).sum() / labels.numel()


def attach(root: nn.Module, name: str, module: nn.Module) -> None:
    """Register `module` under a dotted name, making the containers on the way."""
    *parents, last = name.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)
