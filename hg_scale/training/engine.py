"""Both of DeepSpeed's engines behind one `train_step`.

With one pipeline stage the model is an ordinary module under `DeepSpeedEngine` (ZeRO 0 to 3),
driven by forward, backward and step; with more it is a `PipelineModule` under `PipelineEngine`
(ZeRO 0 and 1), driven by `train_batch`. The training loop sees no difference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import isfinite, nan, sqrt
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hg_scale.checkpoint.fragments import Slice
from hg_scale.config.deepspeed import deepspeed_config
from hg_scale.config.schema import Config, by_level
from hg_scale.model.context import Context, draw_factors
from hg_scale.model.hourglass import Hourglass
from hg_scale.model.layers import PlainLayers
from hg_scale.model.sharding import shard_of
from hg_scale.parallel.deepspeed_adapter import (
    is_stage_copy,
    local_gradients,
    replace_gradient_clipping,
    replace_loss_reduction,
    set_skipped_steps,
    skip_optimizer_step,
    skipped_steps,
    wrap_optimizer_step,
)
from hg_scale.parallel.extensions import load_extensions
from hg_scale.parallel.mesh import Mesh
from hg_scale.parallel.pipeline_cut import PipelineCut, cut_pipeline
from hg_scale.training.agreement import run_on_all_ranks
from hg_scale.training.guard import Guard, name_culprits
from hg_scale.training.norms import NormMeter
from hg_scale.training.optimizer import make_optimizer, set_learning_rate


@dataclass(frozen=True)
class StepResult:
    """Mean loss in nats per token and gradient norm before clipping, identical on all ranks.

    `skip_reason`: why the optimizer did not step; None: it did. `norms`: of weights and updates, if
    they were due.
    """

    loss: float
    grad_norm: float
    skip_reason: str | None = None
    norms: dict[str, list[float]] = field(default_factory=dict)

    @property
    def skipped(self) -> bool:
        return self.skip_reason is not None


def make_engine(
    config: Config,
    mesh: Mesh,
    layers: PlainLayers,
    device: torch.device,
    draw: bool = True,
    report: Callable[[str], None] | None = None,
) -> ModuleEngine | PipelineEngine:
    """Build the model of `config` under DeepSpeed, on this rank of the mesh.

    draw: draw the initial weights; else they must be loaded from a checkpoint.
    report: told what a start waits for, in one line.
    """
    # Adopts the existing process group; a PipelineModule needs it before `initialize`.
    if device.type == "cpu":
        load_extensions(report)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    recompute = by_level(config.training.activation_checkpointing, config.model.parsed.level_count)
    seed = config.training.seed if draw else None
    engine_class: type[ModuleEngine] | type[PipelineEngine]
    if mesh.pipeline == 1:
        model: Any = Hourglass(config.model, layers, recompute, seed=seed)
        engine_class = ModuleEngine
    else:
        from hg_scale.parallel.pipeline import HourglassPipeline

        micro = config.training.micro_batch_size
        cut = cut_pipeline(config.model, mesh.pipeline)
        model = HourglassPipeline(config.model, layers, mesh, cut, micro, recompute, seed=seed)
        engine_class = PipelineEngine
    named = list(model.named_parameters())
    slices = {parameter: describe_slice(name, parameter) for name, parameter in named}
    optimizer = run_on_all_ranks(lambda: make_optimizer(config, named), device)
    settings = deepspeed_config(config, config.micro_batches(mesh.world_size))
    mpu = None
    if mesh.tensor > 1 and mesh.pipeline == 1:
        from hg_scale.parallel.megatron import Mpu

        mpu = Mpu()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, mpu=mpu, dist_init_required=False
    )
    return engine_class(config, mesh, engine, optimizer, device, slices)


def describe_slice(name: str, parameter: nn.Parameter) -> Slice:
    """Return this rank's slice of a parameter; call it before ZeRO 3 frees the parameter."""
    shard = shard_of(parameter)
    shape = shard.unsharded_shape(tuple(parameter.shape))
    return Slice(name, shape, shard.dim, shard.index, shard.count)


def inputs_and_labels(batch: Tensor) -> tuple[Tensor, Tensor]:
    """Split ids (B, L + 1) int64 into inputs and labels, (B, L) each.

    A sequence that could not be read holds -1: its labels are ignored and its inputs are id 0.
    Losses are still divided by B x L, so the weight of the other sequences does not change.
    """
    return batch[:, :-1].clamp(min=0), batch[:, 1:]


class Engine(ABC):
    """Takes optimizer steps and evaluates. `deepspeed` is DeepSpeed's engine, `model` its module.

    Once all gradients are reduced, `guard` judges the step; a bad step leaves weights and moments
    unchanged on every rank.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        slices: dict[nn.Parameter, Slice],
    ) -> None:
        self.config, self.mesh, self.deepspeed, self.device = config, mesh, engine, device
        self.optimizer = optimizer
        self.model: nn.Module = engine.module
        self.slices = slices
        self.micro_batch_size = config.training.micro_batch_size
        self.local_batch_size = config.training.global_batch_size // mesh.data
        self.guard = Guard(config.guard)
        self._norm_meter = NormMeter(config, mesh, engine, slices)
        self._norms: dict[str, list[float]] = {}
        self._step = 0
        self._loss = self._norm = nan
        self._skip_reason: str | None = None
        wrap_optimizer_step(engine, self._guarded_step)
        if config.parallel.zero_stage == 0:
            replace_gradient_clipping(engine, self._clip_gradients)

    @property
    def local_samples(self) -> slice:
        """This rank's samples of the global batch."""
        first = self.mesh.data_rank * self.local_batch_size
        return slice(first, first + self.local_batch_size)

    @property
    def cut(self) -> PipelineCut | None:
        """The pipeline cut; None with one stage."""
        return getattr(self.model, "cut", None)

    def train_step(self, batch: Tensor | None, step: int, learning_rate: float) -> StepResult:
        """Take optimizer step `step`, counted from 1.

        batch: (local batch size, L + 1) int64 ids; None on ranks that need no tokens.
        """
        set_learning_rate(self.optimizer, learning_rate)
        self._step = step
        self._train_step(batch, self._context(step))
        if self.config.parallel.zero_stage > 0:
            self._norm = float(self.deepspeed.get_global_grad_norm())
        return StepResult(self._loss, self._norm, self._skip_reason, self._norms)

    @abstractmethod
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor] | None], length: int) -> float:
        """Sum of the losses in nats over the batches of all data-parallel ranks.

        batches: (ids, labels), each (micro_batch_size, length), the same number on every rank; None
        on ranks that need no tokens.
        """

    @abstractmethod
    def _train_step(self, batch: Tensor | None, context: Context) -> None:
        """Forward, backward and optimizer step over all micro-batches."""

    @abstractmethod
    def _mean_loss(self) -> Tensor:
        """This rank's mean loss of the step, () float32; 0 on all but the last stage."""

    def _context(self, step: int) -> Context:
        """The step's shorten factors and dropout key, and the index of this rank's first sample."""
        model, seed = self.config.model, self.config.training.seed
        factors = model.parsed.factors
        if model.factor_choices:
            factors = draw_factors(model.factor_choices, seed, step)
        return Context(factors, (seed, step), self.local_samples.start)

    def _guarded_step(self, take_step: Callable[[], None]) -> None:
        """Take the optimizer's step, which changes nothing if the guard finds the step bad."""
        finite = self._all_reduce_step_stats()
        reason = self.guard.judge(self._loss, finite)
        if reason:
            reason = name_culprits(reason, self._mean_loss(), self.deepspeed, self.slices)
        skipped = skipped_steps(self.deepspeed)
        measures = self._norm_meter.due(self._step)
        if measures:
            self._norm_meter.begin()
        with skip_optimizer_step(self.optimizer) if reason else nullcontext():
            take_step()
        self._norms = self._norm_meter.finish(self.device) if measures else {}
        if skipped_steps(self.deepspeed) > skipped and not reason:
            reason = "the gradient norm overflows float32"
        self._skip_reason = reason
        set_skipped_steps(self.deepspeed, skipped + bool(reason))
        self.guard.record(self._step, self._loss, bool(reason))

    def _all_reduce_step_stats(self) -> bool:
        """Set the mean loss on all ranks. Returns whether the gradients of all ranks are finite.

        One collective. Under ZeRO 0 it also sets the gradient norm.
        """
        mesh = self.mesh
        gradients = local_gradients(self.deepspeed, self.slices)
        norms = torch.stack(torch._foreach_norm(gradients)).double()
        stats = torch.zeros(3, dtype=torch.float64, device=self.device)
        if mesh.is_last_stage and mesh.tensor_rank == 0:
            stats[0] = self._mean_loss()
        stats[1] = ~norms.sum().isfinite()
        if self.config.parallel.zero_stage == 0 and mesh.data_rank == 0:
            stats[2] = norms[self._counted_in_norm()].square().sum()
        if mesh.world_size > 1:
            dist.all_reduce(stats)
        loss, not_finite, squares = stats.tolist()
        self._loss, self._norm = loss / mesh.data, sqrt(squares)
        return not not_finite

    def _counted_in_norm(self) -> list[bool]:
        """For each gradient, under ZeRO 0: whether this rank adds it to the norm of the model."""
        return [
            not is_stage_copy(parameter)
            and (shard_of(parameter).dim is not None or self.mesh.tensor_rank == 0)
            for parameter in self.slices
            if parameter.grad is not None
        ]

    def _clip_gradients(self) -> None:
        """Under ZeRO 0: clip by the norm of the model, in which each parameter counts once."""
        limit = self.config.optimizer.gradient_clipping
        if limit and isfinite(self._norm):
            scale = min(limit / (self._norm + 1e-6), 1.0)
            torch._foreach_mul_(local_gradients(self.deepspeed, self.slices), scale)


class ModuleEngine(Engine):
    """One pipeline stage: forward, backward, step."""

    def _train_step(self, batch: Tensor | None, context: Context) -> None:
        assert batch is not None
        self.deepspeed.train()
        self._total = torch.zeros((), device=self.device)
        for start in range(0, self.local_batch_size, self.micro_batch_size):
            micro_batch = batch[start : start + self.micro_batch_size]
            first = context.first_sample + start
            micro_context = Context(context.factors, context.key, first)
            loss = self.deepspeed(*inputs_and_labels(micro_batch), micro_context)
            self._total += loss.detach()
            self.deepspeed.backward(loss)
            self.deepspeed.step()

    def _mean_loss(self) -> Tensor:
        return self._total * (self.micro_batch_size / self.local_batch_size)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor] | None], length: int) -> float:
        self.deepspeed.eval()
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        for batch in batches:
            assert batch is not None
            total += self.deepspeed(*batch).double() * batch[1].numel()
        if self.mesh.data > 1:
            dist.all_reduce(total, group=self.deepspeed.data_parallel_group)
        return float(total)


class PipelineEngine(Engine):
    """Several stages: DeepSpeed's 1F1B schedule."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._shape: tuple[tuple[int, ...], int, int] | None = None
        replace_loss_reduction(self.deepspeed, lambda: self._loss)

    def _begin(self, context: Context, length: int, batch_size: int) -> None:
        """Set the context of this stage; reset DeepSpeed's buffers when the shapes change."""
        shape = (context.factors, length, batch_size)
        if shape != self._shape:
            self.deepspeed.reset_activation_shape()
            self._shape = shape
        self.model.begin(context, length)  # type: ignore[operator]

    def _train_step(self, batch: Tensor | None, context: Context) -> None:
        length = self.config.model.sequence_length
        self._begin(context, length, self.micro_batch_size)
        self.deepspeed.train_batch(self._micro_batches(batch))

    def _mean_loss(self) -> Tensor:
        total = self.deepspeed.total_loss
        if total is None:  # an earlier stage
            return torch.zeros((), device=self.device)
        return total.detach() * (self.micro_batch_size / self.local_batch_size)

    def _micro_batches(self, batch: Tensor | None) -> Iterator[tuple[Tensor, Tensor]] | None:
        if batch is None:
            return None
        return map(inputs_and_labels, batch.split(self.micro_batch_size))

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor] | None], length: int) -> float:
        micro_batches = list(batches)
        count = len(micro_batches)
        self._begin(Context(self.config.model.parsed.factors), length, self.micro_batch_size)
        needs_tokens = not micro_batches or micro_batches[0] is not None
        data = iter(micro_batches) if needs_tokens else None
        mean = self.deepspeed.eval_batch(data, num_micro_batches=count)
        return float(mean) * count * self.micro_batch_size * length * self.mesh.data
