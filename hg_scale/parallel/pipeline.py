"""The layer list over pipeline stages, under DeepSpeed's PipelineEngine.

A boundary inside the valley must carry the short activations and every open skip. They travel as
one tensor, laid flat and side by side, packed and unpacked here; layers never see it. (Given a
tuple, DeepSpeed walks shared graph once for each tensor, and fails with tensor parallelism.)
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from hg_scale.config.schema import ModelConfig
from hg_scale.model.block import Activations
from hg_scale.model.context import Context
from hg_scale.model.hourglass import attach, make_layer, make_shared_bias, mean_loss
from hg_scale.model.layers import PlainLayers
from hg_scale.model.plan import boundary_shapes, layer_plan
from hg_scale.parallel.mesh import Mesh, compare_group
from hg_scale.parallel.stages import Cut


class HourglassPipeline(PipelineModule):
    """The layers of this rank's stage, named as in the whole model.

    Call `begin` before every `train_batch` and `eval_batch`: the stage counts its micro-batches
    from there to know which samples it holds.
    """

    def __init__(
        self,
        model: ModelConfig,
        parts: PlainLayers,
        mesh: Mesh,
        cut: Cut,
        micro_batch_size: int,
        recompute: list[bool] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.config, self.layer_parts, self.cut = model, parts, cut
        self.micro_batch_size, self.recompute = micro_batch_size, recompute
        self.layer_plan = layer_plan(model)
        self.context = Context(model.parsed.factors)
        self.length = model.sequence_length
        topology = PipeModelDataParallelTopology(
            num_pp=mesh.pipeline, num_mp=mesh.tensor, num_dp=mesh.data
        )
        super().__init__(
            layers=self.layer_plan,
            topology=topology,
            loss_fn=lambda logits, labels: mean_loss(parts, logits, labels),
        )
        for axis, ranks in {
            "tensor": self._grid.slice_group,
            "data": self._grid.dp_group,
            "pipeline": self._grid.pp_group,
        }.items():
            compare_group(mesh, axis, list(ranks), "DeepSpeed")

    def _partition_layers(self, method: str = "") -> None:
        """Cut by cost instead of by DeepSpeed's methods."""
        self.parts = list(self.cut.parts)
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    def _build(self) -> None:
        """Build this stage's layers under the names that they have in the whole model."""
        self.position_bias = make_shared_bias(self.config, self.layer_parts)
        for plan in self.layer_plan[self._local_start : self._local_stop]:
            again = bool(self.recompute and self.recompute[plan.level])
            layer = make_layer(plan, self.config, self.layer_parts, self.position_bias, again)
            attach(self, plan.name, layer)
            self.forward_funcs.append(layer)
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False
        if self.position_bias is not None:
            # Each stage holds a copy; DeepSpeed counts the first one only in gradient norms.
            for parameter in self.position_bias.parameters():
                parameter.ds_pipe_replicated = self.stage_id > 0  # type: ignore[attr-defined]

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
        """The shared position biases, whose gradients are added up over the stages."""
        if self.position_bias is None:
            return []
        tied = list(self.position_bias.parameters())
        for parameter in tied:
            if parameter.grad is None:  # a stage without relative attention takes part with zeros
                parameter.grad = torch.zeros_like(parameter)
        return [(parameter, self._grid.get_pipe_parallel_group()) for parameter in tied]

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
            self.config, self.layer_plan, self._local_start, self.length, self.context.factors
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
