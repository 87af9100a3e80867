"""Both DeepSpeed engines behind one `train_step`.

With one pipeline stage the model is an ordinary module under `DeepSpeedEngine` (ZeRO 0 to 3),
driven by forward, backward and step; with more it is a `PipelineModule` under `PipelineEngine`
(ZeRO 0 and 1), driven by `train_batch`. The loop sees no difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import isfinite, nan
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
from hg_scale.parallel.initialization import initialize
from hg_scale.parallel.mesh import Mesh
from hg_scale.parallel.sharding import shard_of
from hg_scale.parallel.stages import Cut, cut_pipeline
from hg_scale.training.agreement import together
from hg_scale.training.optimizer import make_optimizer, set_learning_rate


@dataclass(frozen=True)
class StepResult:
    """Mean loss in nats a token and gradient norm before clipping, alike on all ranks.

    `skipped`: the optimizer did not step, since the gradients were not finite.
    """

    loss: float
    grad_norm: float
    skipped: bool


def make_engine(
    config: Config, mesh: Mesh, parts: PlainLayers, device: torch.device, draw: bool = True
) -> ModuleEngine | PipelineEngine:
    """The model of `config`, initialised, under DeepSpeed, on this rank of the mesh.

    `draw`: fill the weights; without it they are to be read from a checkpoint.
    """
    # Adopts the process group that is there; a PipelineModule needs it before `initialize`.
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    recompute = by_level(config.training.activation_checkpointing, config.model.parsed.scales)
    kind: type[ModuleEngine] | type[PipelineEngine]
    if mesh.pipeline == 1:
        model: Any = Hourglass(config.model, parts, recompute)
        kind = ModuleEngine
    else:
        from hg_scale.parallel.pipeline import HourglassPipeline

        micro = config.training.micro_batch_size
        cut = cut_pipeline(config.model, mesh.pipeline)
        model = HourglassPipeline(config.model, parts, mesh, cut, micro, recompute)
        kind = PipelineEngine
    named = list(model.named_parameters())
    if draw:
        initialize(named, config.model, config.training.seed)
    slices = {parameter: describe_slice(name, parameter) for name, parameter in named}
    optimizer = together(lambda: make_optimizer(config, named), device)
    settings = deepspeed_config(config, config.micro_batches(mesh.world_size))
    mpu = None
    if mesh.tensor > 1 and mesh.pipeline == 1:
        from hg_scale.parallel.megatron import Mpu

        mpu = Mpu()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, mpu=mpu, dist_init_required=False
    )
    return kind(config, mesh, engine, optimizer, device, slices)


def describe_slice(name: str, parameter: nn.Parameter) -> Slice:
    """A parameter of this rank in the words of a checkpoint (before ZeRO 3 empties it)."""
    shard = shard_of(parameter)
    shape = shard.whole_shape(tuple(parameter.shape))
    return Slice(name, shape, shard.dim, shard.index, shard.count)


def inputs_and_labels(batch: Tensor) -> tuple[Tensor, Tensor]:
    """ids (B, L + 1) as inputs and labels, (B, L) each.

    A window that could not be read holds -1: no label there counts, and as an input it is id 0.
    Losses are divided by B x L all the same, so the other windows weigh as they would have.
    """
    return batch[:, :-1].clamp(min=0), batch[:, 1:]


class Engine:
    """What the loop drives. `deepspeed` is the engine inside, `model` the module."""

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
        self.rows = config.training.global_batch_size // mesh.data  # of this rank, a step
        self._norm = nan
        if config.parallel.zero_stage == 0:
            # DeepSpeed's own clipping in fp32 leaves norms and biases of later stages out.
            engine.clip_fp32_gradients = self._clip_gradients

    @property
    def cut(self) -> Cut | None:
        """How the pipeline is cut, if there is one."""
        return getattr(self.model, "cut", None)

    def train_step(self, batch: Tensor | None, step: int, learning_rate: float) -> StepResult:
        """One optimizer step, the `step`-th (from 1).

        batch: (rows of this rank, L + 1) int64 ids; None on ranks that need no tokens.
        """
        set_learning_rate(self.optimizer, learning_rate)
        skipped_before = self.deepspeed.skipped_steps
        loss = self._train_step(batch, self._context(step))
        norm = self._norm
        if self.config.parallel.zero_stage > 0:
            norm = float(self.deepspeed.get_global_grad_norm())
        return StepResult(loss, norm, self.deepspeed.skipped_steps > skipped_before)

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor] | None], length: int) -> float:
        """Sum of the losses in nats over all data-parallel ranks' batches.

        batches: (ids, labels), each (micro_batch_size, length), as many on every rank; None on
        ranks that need no tokens.
        """
        raise TypeError(f"{type(self).__name__} defines no evaluate")

    def _train_step(self, batch: Tensor | None, context: Context) -> float:
        raise TypeError(f"{type(self).__name__} defines no _train_step")

    def _context(self, step: int) -> Context:
        """This step's factors and dropout key; the first sample is this rank's."""
        model, seed = self.config.model, self.config.training.seed
        factors = model.parsed.factors
        if model.factor_choices:
            factors = draw_factors(model.factor_choices, seed, step)
        return Context(factors, (seed, step), self.mesh.data_rank * self.rows)

    def _clip_gradients(self) -> None:
        """Global norm over the model's ranks, each parameter counted once, then clipping."""
        squares = torch.zeros((), device=self.device)
        gradients = []
        for parameter in self.slices:
            if parameter.grad is None:
                continue
            gradients.append(parameter.grad)
            sharded = shard_of(parameter).dim is not None
            if getattr(parameter, "ds_pipe_replicated", False):
                continue
            if sharded or self.mesh.tensor_rank == 0:
                squares += parameter.grad.float().square().sum()
        mpu = self.deepspeed.mpu
        if mpu is not None:
            dist.all_reduce(squares, group=mpu.get_model_parallel_group())
        norm = squares.sqrt()
        self._norm = float(norm)
        if not isfinite(self._norm):
            for parameter in self.slices:
                parameter.grad = None  # the optimizer passes over it
            self.deepspeed.skipped_steps += 1
            return
        limit = self.config.optimizer.gradient_clipping
        if limit:
            scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
            torch._foreach_mul_(gradients, scale)


class ModuleEngine(Engine):
    """One pipeline stage: forward, backward, step."""

    def _train_step(self, batch: Tensor | None, context: Context) -> float:
        assert batch is not None
        self.deepspeed.train()
        total = torch.zeros((), device=self.device)
        for start in range(0, self.rows, self.micro_batch_size):
            micro = batch[start : start + self.micro_batch_size]
            here = Context(context.factors, context.key, context.first_sample + start)
            loss = self.deepspeed(*inputs_and_labels(micro), here)
            self.deepspeed.backward(loss)
            self.deepspeed.step()
            total += loss.detach()
        total *= self.micro_batch_size / self.rows
        if self.mesh.data > 1:
            dist.all_reduce(total, group=self.deepspeed.data_parallel_group)
            total /= self.mesh.data
        return float(total)

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

    def _begin(self, context: Context, length: int, rows: int) -> None:
        """Tell the stage what comes, and DeepSpeed when the shapes at its boundaries change."""
        shape = (context.factors, length, rows)
        if shape != self._shape:
            self.deepspeed.reset_activation_shape()
            self._shape = shape
        self.model.begin(context, length)  # type: ignore[operator]

    def _train_step(self, batch: Tensor | None, context: Context) -> float:
        length = self.config.model.sequence_length
        self._begin(context, length, self.micro_batch_size)
        return float(self.deepspeed.train_batch(self._micro_batches(batch)))

    def _micro_batches(self, batch: Tensor | None) -> Iterator[tuple[Tensor, Tensor]] | None:
        if batch is None:
            return None
        return map(inputs_and_labels, batch.split(self.micro_batch_size))

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor] | None], length: int) -> float:
        todo = list(batches)
        self._begin(Context(self.config.model.parsed.factors), length, self.micro_batch_size)
        needed = None if todo and todo[0] is None else iter(todo)
        mean = self.deepspeed.eval_batch(needed, num_micro_batches=len(todo))
        return float(mean) * len(todo) * self.micro_batch_size * length * self.mesh.data
