"""Both DeepSpeed engines behind one `train_step`.

With one pipeline stage the model is an ordinary module under `DeepSpeedEngine` (ZeRO 0 to 3),
driven by forward, backward and step; with more it is a `PipelineModule` under `PipelineEngine`
(ZeRO 0 and 1), driven by `train_batch`. The loop sees no difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
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
from hg_scale.model.initialization import initialize_weights
from hg_scale.model.layers import PlainLayers
from hg_scale.model.sharding import shard_of
from hg_scale.parallel.extensions import load_extensions
from hg_scale.parallel.mesh import Mesh
from hg_scale.parallel.stages import Cut, cut_pipeline
from hg_scale.training.agreement import run_on_all_ranks
from hg_scale.training.gradients import local_gradients, skip_optimizer_step
from hg_scale.training.guard import Guard, name_culprits
from hg_scale.training.optimizer import make_optimizer, set_learning_rate


@dataclass(frozen=True)
class StepResult:
    """Mean loss in nats a token and gradient norm before clipping, alike on all ranks.

    `why`: the optimizer did not step, for this reason.
    """

    loss: float
    grad_norm: float
    why: str | None = None

    @property
    def skipped(self) -> bool:
        return self.why is not None


def make_engine(
    config: Config, mesh: Mesh, parts: PlainLayers, device: torch.device, draw: bool = True
) -> ModuleEngine | PipelineEngine:
    """The model of `config`, initialised, under DeepSpeed, on this rank of the mesh.

    `draw`: fill the weights; without it they are to be read from a checkpoint.
    """
    # Adopts the process group that is there; a PipelineModule needs it before `initialize`.
    if device.type == "cpu":
        load_extensions()
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    recompute = by_level(config.training.activation_checkpointing, config.model.parsed.level_count)
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
        initialize_weights(named, config.model, config.training.seed)
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
    """What the loop drives. `deepspeed` is the engine inside, `model` the module.

    Both of DeepSpeed's engines end a step in `_take_model_step`, when all gradients are there. Here
    `guard` is asked first, and a bad step leaves weights and moments alone on every rank.
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
        self.rows = config.training.global_batch_size // mesh.data  # of this rank, a step
        self.guard = Guard(config.guard)
        self._step = 0
        self._loss = self._norm = nan
        self._why: str | None = None
        self._take_step = engine._take_model_step
        engine._take_model_step = self._take_good_step
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
        self._step = step
        self._train_step(batch, self._context(step))
        if self.config.parallel.zero_stage > 0:
            self._norm = float(self.deepspeed.get_global_grad_norm())
        return StepResult(self._loss, self._norm, self._why)

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor] | None], length: int) -> float:
        """Sum of the losses in nats over all data-parallel ranks' batches.

        batches: (ids, labels), each (micro_batch_size, length), as many on every rank; None on
        ranks that need no tokens.
        """
        raise TypeError(f"{type(self).__name__} defines no evaluate")

    def _train_step(self, batch: Tensor | None, context: Context) -> None:
        raise TypeError(f"{type(self).__name__} defines no _train_step")

    def _mean_loss(self) -> Tensor:
        """This rank's mean loss of the step, () float32, where it has one (the last stage)."""
        raise TypeError(f"{type(self).__name__} defines no _mean_loss")

    def _context(self, step: int) -> Context:
        """This step's factors and dropout key; the first sample is this rank's."""
        model, seed = self.config.model, self.config.training.seed
        factors = model.parsed.factors
        if model.factor_choices:
            factors = draw_factors(model.factor_choices, seed, step)
        return Context(factors, (seed, step), self.mesh.data_rank * self.rows)

    def _take_good_step(self, *arguments: Any) -> None:
        """The optimizer's step, without effect where the guard finds it bad."""
        finite = self._exchange_signs()
        self._why = self.guard.judge(self._loss, finite)
        if self._why:
            self._why = name_culprits(self._why, self._mean_loss(), self.deepspeed, self.slices)
        skipped = self.deepspeed.skipped_steps
        with skip_optimizer_step(self.optimizer) if self._why else nullcontext():
            self._take_step(*arguments)
        if self.deepspeed.skipped_steps > skipped and not self._why:
            self._why = "the norm of its gradients is beyond float32"
        self.deepspeed.skipped_steps = skipped + bool(self._why)
        self.guard.note(self._step, self._loss, bool(self._why))

    def _exchange_signs(self) -> bool:
        """Whether the gradients of all ranks are finite; sets the mean loss, alike on all ranks.

        One collective operation of all ranks. Without ZeRO it also gives the gradients' norm.
        """
        mesh = self.mesh
        held = local_gradients(self.deepspeed, self.slices)
        norms = torch.stack(torch._foreach_norm(held)).double()
        signs = torch.zeros(3, dtype=torch.float64, device=self.device)
        if mesh.is_last_stage and mesh.tensor_rank == 0:
            signs[0] = self._mean_loss()
        signs[1] = ~norms.sum().isfinite()
        if self.config.parallel.zero_stage == 0 and mesh.data_rank == 0:
            signs[2] = norms[self._counted_once()].square().sum()
        if mesh.world_size > 1:
            dist.all_reduce(signs)
        loss, bad, squares = signs.tolist()
        self._loss, self._norm = loss / mesh.data, sqrt(squares)
        return not bad

    def _counted_once(self) -> list[bool]:
        """For each gradient, without ZeRO: this rank counts it in the norm of the whole model."""
        return [
            not getattr(parameter, "ds_pipe_replicated", False)
            and (shard_of(parameter).dim is not None or self.mesh.tensor_rank == 0)
            for parameter in self.slices
            if parameter.grad is not None
        ]

    def _clip_gradients(self) -> None:
        """Without ZeRO: to the norm of the model's gradients, each parameter counted once."""
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
        for start in range(0, self.rows, self.micro_batch_size):
            micro = batch[start : start + self.micro_batch_size]
            here = Context(context.factors, context.key, context.first_sample + start)
            loss = self.deepspeed(*inputs_and_labels(micro), here)
            self._total += loss.detach()
            self.deepspeed.backward(loss)
            self.deepspeed.step()

    def _mean_loss(self) -> Tensor:
        return self._total * (self.micro_batch_size / self.rows)

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
        # Its own would exchange the losses again, after the step.
        self.deepspeed._aggregate_total_loss = lambda: self._loss

    def _begin(self, context: Context, length: int, rows: int) -> None:
        """Tell the stage what comes, and DeepSpeed when the shapes at its boundaries change."""
        shape = (context.factors, length, rows)
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
        return total.detach() * (self.micro_batch_size / self.rows)

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
