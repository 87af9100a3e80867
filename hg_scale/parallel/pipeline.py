"""The layer list over pipeline stages, under DeepSpeed's PipelineEngine.

A boundary between inner levels carries the short activations and every open skip. They cross as one
flat tensor, packed and unpacked here; layers never see it. (Given a tuple, DeepSpeed runs backward
through the shared graph once per tensor, which fails with tensor parallelism.)
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn

from hg_scale.config.constants import DEFAULT_SEED
from hg_scale.config.schema import ModelConfig
from hg_scale.model.block import Activations
from hg_scale.model.context import Context
from hg_scale.model.hourglass import attach, make_layer, make_shared_bias, mean_loss
from hg_scale.model.initialization import initialize_weights
from hg_scale.model.layers import PlainLayers
from hg_scale.model.plan import boundary_shapes, layer_plan
from hg_scale.parallel.deepspeed_adapter import StageModule
from hg_scale.parallel.mesh import Mesh, compare_group
from hg_scale.parallel.pipeline_cut import PipelineCut


class HourglassPipeline(StageModule):
    """The layers of this rank's stage, with the parameter names of the full model.

    Call `begin` before every `train_batch` and `eval_batch`: the stage counts its micro-batches
    from there to know which samples it holds.
    """

    def __init__(
        self,
        model: ModelConfig,
        parts: PlainLayers,
        mesh: Mesh,
        cut: PipelineCut,
        micro_batch_size: int,
        recompute: list[bool] | None = None,
        *,
        seed: int | None = DEFAULT_SEED,
    ) -> None:
        nn.Module.__init__(self)
        self.config, self.layer_parts, self.cut = model, parts, cut
        self.micro_batch_size, self.recompute = micro_batch_size, recompute
        self.layer_plan = layer_plan(model)
        self.context = Context(model.parsed.factors)
        self.length = model.sequence_length
        super().__init__(
            self.layer_plan,
            cut.parts,
            lambda logits, labels: mean_loss(parts, logits, labels),
            tensor=mesh.tensor,
            pipeline=mesh.pipeline,
            data=mesh.data,
        )
        for axis, ranks in self.group_ranks().items():
            compare_group(mesh, axis, ranks, "DeepSpeed")
        if seed is not None:
            initialize_weights(self.named_parameters(), model, seed)

    def build_layers(self, start: int, stop: int) -> list[nn.Module]:
        self.position_bias = make_shared_bias(self.config, self.layer_parts)
        layers: list[nn.Module] = []
        for plan in self.layer_plan[start:stop]:
            recompute = bool(self.recompute and self.recompute[plan.level])
            layer = make_layer(plan, self.config, self.layer_parts, self.position_bias, recompute)
            attach(self, plan.name, layer)
            layers.append(layer)
        return layers

    def shared_parameters(self) -> list[nn.Parameter]:
        """The shared position biases: every stage holds a copy."""
        return [] if self.position_bias is None else list(self.position_bias.parameters())

    def begin(self, context: Context, length: int) -> None:
        """Start a batch: `context.first_sample` is the first of this data-parallel rank."""
        self.context, self.length, self._micro_batch = context, length, 0

    def forward(self, x: Tensor) -> Tensor:
        """ids (B, L) or packed activations in; packed activations or logits out."""
        first = self.context.first_sample + self._micro_batch * self.micro_batch_size
        self._micro_batch += 1
        context = Context(self.context.factors, self.context.key, first)
        state = Activations(x) if self.stage_id == 0 else self._unpack(x)
        for layer in self.forward_funcs:
            state = layer(state, context)
        return state.x if self.stage_id == self.num_stages - 1 else pack(state)

    def _unpack(self, packed: Tensor) -> Activations:
        shapes = boundary_shapes(
            self.config, self.layer_plan, self.first_layer, self.length, self.context.factors
        )
        return unpack(packed, shapes)


def pack(state: Activations) -> Tensor:
    """Activations and open skips as one tensor: (B, sum of positions x width)."""
    return torch.cat([t.flatten(1) for t in (state.x, *state.skips)], 1)


def unpack(packed: Tensor, shapes: list[tuple[int, int]]) -> Activations:
    """The inverse of `pack`; `shapes` are (positions, width), activations first."""
    ends = list(accumulate(n * d for n, d in shapes))
    pieces = packed.tensor_split(ends[:-1], 1)
    x, *skips = (p.unflatten(1, shape) for p, shape in zip(pieces, shapes, strict=True))
    return Activations(x, tuple(skips))
