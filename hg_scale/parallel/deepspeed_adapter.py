"""The only module that reads or overrides private state of DeepSpeed (tested with 0.19.8).

`tests/parallel/test_deepspeed_adapter.py` is its contract test: after an update it names the
attribute that DeepSpeed has moved. By ZeRO stage, DeepSpeed keeps on each rank:

| stage          | fp32 weights and Adam's moments     | reduced gradients               |
| -------------- | ----------------------------------- | ------------------------------- |
| 0              | the parameters of torch's optimizer | `parameter.grad`                |
| 1 (bf16)       | a flat partition for each group     | a flat fp32 buffer per group    |
| 1 (fp32) and 2 | a flat partition for each group     | a list of tensors per group     |
| 3              | a flat tensor for each sub-group    | a list of tensors per sub-group |

In a flat partition, `parameter._hp_mapping` maps a parameter's elements to their offsets (None: no
element is on this rank). In stage 3, `grad_position` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn


class MasterShard(NamedTuple):
    """Where this rank keeps fp32 weights of a parameter.

    Elements [start, start + length) of the flat local parameter are at `offset` of `tensor`, which
    is one of the parameters of torch's optimizer.
    """

    tensor: Tensor
    offset: int
    start: int
    length: int


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return torch's optimizer, which DeepSpeed's wraps; its state holds the moments."""
    return engine.basic_optimizer


def master_shard(engine: Any, parameter: Any, size: int) -> MasterShard | None:
    """Locate the fp32 master weights of a parameter of `size` local elements on this rank.

    None if this rank has none of them.
    """
    if hasattr(parameter, "ds_tensor"):  # ZeRO 3
        zero = engine.optimizer
        group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
        start = padded * dist.get_rank(parameter.ds_process_group)
        length = min(padded, size - start)
        flat = zero.fp32_partitioned_groups_flat[group]
        return MasterShard(flat, offset, start, length) if length > 0 else None
    if hasattr(parameter, "_hp_mapping"):  # ZeRO 1, 2
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"][0]
        fp32, local = mapping.hp_fragment_address, mapping.lp_fragment_address
        return MasterShard(flat, fp32.start, local.start, local.numel)
    return MasterShard(parameter, 0, 0, size)


def partition(parameter: Any) -> Tensor | None:
    """Return this rank's flat, padded share of the compute weights in ZeRO 3; None below that."""
    return getattr(parameter, "ds_tensor", None)


def local_gradients(engine: Any, parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return the reduced gradients that this rank's optimizer step uses.

    Valid just before the step. Together, the data-parallel ranks hold every gradient.
    """
    if groups := _gradient_groups(engine.optimizer):
        return [gradient for group in groups for gradient in group]
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def gradients_by_parameter(
    engine: Any, parameters: Iterable[nn.Parameter]
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Yield copies of `local_gradients` by parameter; skips parameters not held by this rank."""
    groups = _gradient_groups(engine.optimizer)
    if groups and hasattr(engine.optimizer, "fp16_groups"):  # ZeRO 3
        for members, gradients in zip(engine.optimizer.fp16_groups, groups, strict=True):
            yield from zip(members, gradients, strict=True)
        return
    flat = [torch.cat([gradient.flatten() for gradient in group]) for group in groups]
    for parameter in parameters:
        if mapping := getattr(parameter, "_hp_mapping", None):
            address = mapping.hp_fragment_address
            yield parameter, flat[mapping.param_group_index].narrow(0, address.start, address.numel)
        elif not groups and parameter.grad is not None:
            yield parameter, parameter.grad


def _gradient_groups(optimizer: Any) -> list[list[Tensor]]:
    """Gradients by group in the order of DeepSpeed's groups; empty without ZeRO."""
    if hasattr(optimizer, "averaged_gradients"):
        averaged = optimizer.averaged_gradients
        return [averaged[group] for group in sorted(averaged)]
    return [[flat] for flat in getattr(optimizer, "fp32_groups_gradient_flat_partition", ())]


def wrap_optimizer_step(engine: Any, wrapper: Callable[[Callable[[], None]], None]) -> None:
    """Have DeepSpeed call `wrapper(step)` where it would call `step()`, all gradients reduced.

    Both DeepSpeedEngine and PipelineEngine end a step in `_take_model_step`.
    """
    take_step = engine._take_model_step
    engine._take_model_step = lambda *arguments: wrapper(lambda: take_step(*arguments))


def skipped_steps(engine: Any) -> int:
    """The optimizer steps that DeepSpeed has counted as skipped."""
    return engine.skipped_steps


def set_skipped_steps(engine: Any, count: int) -> None:
    """Correct DeepSpeed's count, which does not see the steps that the guard skips."""
    engine.skipped_steps = count


@contextmanager
def skip_optimizer_step(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within this context the optimizer's step does nothing.

    DeepSpeed still reads and clears the gradients, whatever its buffers are. Weights, moments and
    Adam's step count stay; the weights computed with are rounded from the same masters again.
    """
    optimizer.step = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del optimizer.step


def replace_gradient_clipping(engine: Any, clip: Callable[[], None]) -> None:
    """Clip by `clip` under ZeRO 0: in fp32 DeepSpeed leaves out vectors of later stages."""
    engine.clip_fp32_gradients = clip


def replace_loss_reduction(engine: Any, loss: Callable[[], float]) -> None:
    """Have a PipelineEngine report `loss()`; its own would reduce the losses again after a step."""
    engine._aggregate_total_loss = loss


def mark_stage_copy(parameter: Any, is_copy: bool) -> None:
    """Mark a parameter whose original is on an earlier stage: DeepSpeed's norms leave it out."""
    parameter.ds_pipe_replicated = is_copy


def is_stage_copy(parameter: nn.Parameter) -> bool:
    """Whether `mark_stage_copy` marked it as a copy."""
    return getattr(parameter, "ds_pipe_replicated", False)


class StageModule(PipelineModule):
    """A PipelineModule that builds layers [cut[s], cut[s + 1]) on stage s.

    DeepSpeed would cut by one of its own methods and name parameters by the layer's index; a
    subclass builds its layers in `build_layers`, registers them under names of its own and returns
    them. Sharing parameters between stages: `shared_parameters`.
    """

    def __init__(
        self,
        layers: list[Any],
        cut: tuple[int, ...],
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        tensor: int,
        pipeline: int,
        data: int,
    ) -> None:
        self._cut = cut
        topology = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data)
        super().__init__(layers=layers, topology=topology, loss_fn=loss)

    def build_layers(self, start: int, stop: int) -> list[nn.Module]:
        """The modules of layers [start, stop), in order."""
        raise NotImplementedError

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters of which every stage holds a copy; their gradients are summed over stages."""
        raise NotImplementedError

    def group_ranks(self) -> dict[str, list[int]]:
        """The global ranks of DeepSpeed's groups of this rank, by axis of the mesh."""
        grid = self._grid
        groups = {"tensor": grid.slice_group, "data": grid.dp_group, "pipeline": grid.pp_group}
        return {axis: list(ranks) for axis, ranks in groups.items()}

    @property
    def first_layer(self) -> int:
        """The index of this stage's first layer."""
        return self._local_start

    def _partition_layers(self, method: str = "") -> None:
        self.parts = list(self._cut)
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    def _build(self) -> None:
        self.forward_funcs += self.build_layers(self._local_start, self._local_stop)
        for parameter in self.parameters():
            mark_stage_copy(parameter, False)
        for parameter in self.shared_parameters():
            mark_stage_copy(parameter, self.stage_id > 0)

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
        """What DeepSpeed sums over stages; a stage that did not use a parameter adds zeros."""
        shared = self.shared_parameters()
        for parameter in shared:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [(parameter, self._grid.get_pipe_parallel_group()) for parameter in shared]
