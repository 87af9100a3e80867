"""One training run, from a checked configuration to its last checkpoint."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hg_scale.config.errors import ConfigError
from hg_scale.config.schema import Config
from hg_scale.data.schedule import Source
from hg_scale.errors import UserError
from hg_scale.exit_codes import CONFIG_ERROR, DONE, FAILED, GAVE_UP
from hg_scale.model.costs import parameter_count
from hg_scale.parallel.launch import Launch
from hg_scale.parallel.mesh import Mesh, make_mesh, start_processes
from hg_scale.training.agreement import Stopped, together
from hg_scale.training.batches import Batches
from hg_scale.training.begin import agreed_source
from hg_scale.training.console import Console, quiet_libraries
from hg_scale.training.corpora import bytes_per_token, open_sources
from hg_scale.training.device import peak_flops
from hg_scale.training.guard import GaveUp
from hg_scale.training.held_out import HeldOut
from hg_scale.training.loop import Parts, Progress, Record, training_loop
from hg_scale.training.metrics import MetricsLog
from hg_scale.training.profiling import StepProfiler
from hg_scale.training.run_lock import RunLock
from hg_scale.training.saver import Saver
from hg_scale.training.schedule import Schedule
from hg_scale.training.state import layout_of, load_state
from hg_scale.training.wandb_log import WandbLog


def train(
    config: Config,
    folder: Path,
    launch: Launch,
    *,
    stop_at: int | None = None,
    profile: int | None = None,
) -> int:
    """Train, or go on where the run folder stands. Returns the exit code.

    A fault that a person can mend ends in one line: the first rank that met it tells it, and the
    others end with it.
    """
    fault: Exception | None = None
    with ExitStack() as stack:
        try:
            log = folder / "logs" / f"rank-{launch.rank}.log"
            terminal = stack.enter_context(quiet_libraries(log))
        except OSError as error:
            print(f"{folder}: rank {launch.rank} cannot write there: {error}", file=sys.stderr)
            return FAILED
        console = Console(config.training.steps, rank=launch.rank, stream=terminal)
        try:
            with console:
                _train(config, folder, launch, console, stop_at, profile)
        except UserError as error:
            fault = error
        except KeyboardInterrupt:
            fault = UserError("interrupted; started again, the run goes on from its checkpoint")
        finally:
            if dist.is_initialized() and fault is None:
                dist.destroy_process_group()
    if fault is None:
        return DONE
    met: object = fault
    if isinstance(fault, Stopped):
        met = fault.__cause__
    else:
        print(fault, file=sys.stderr)
    if isinstance(met, GaveUp):
        return GAVE_UP
    return CONFIG_ERROR if isinstance(met, ConfigError) else FAILED


def _train(
    config: Config,
    folder: Path,
    launch: Launch,
    console: Console,
    stop_at: int | None,
    profile: int | None,
) -> None:
    if config.parallel.tensor > 1:
        # One hardware queue, so that Megatron's asynchronous all-reduce starts before the matrix
        # product that it is to overlap with. CUDA reads it when the device is first used.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = start_processes(launch)
    lock = together(lambda: RunLock(folder) if launch.rank == 0 else None, device)
    with lock or nullcontext():
        _train_alone(config, folder, launch, console, stop_at, profile, device, lock)


def _train_alone(
    config: Config,
    folder: Path,
    launch: Launch,
    console: Console,
    stop_at: int | None,
    profile: int | None,
    device: torch.device,
    lock: RunLock | None,
) -> None:
    """Once no other run has the folder, whose `lock` the first rank holds."""
    checkpoints = folder / "checkpoints"
    beginning = agreed_source(config, checkpoints, console, device)
    sources = together(lambda: open_sources(config), device)
    mesh, layers = make_mesh(config.parallel)

    from hg_scale.training.engine import make_engine  # imports DeepSpeed

    engine = make_engine(config, mesh, layers, device, draw=beginning.checkpoint is None)
    progress = Progress()
    if checkpoint := beginning.checkpoint:
        progress = together(lambda: load_state(engine, checkpoint), device)
    peak = peak_flops(config.training.precision, device.type)
    describe(config, mesh, console, engine.cut)
    console.print(f"peak of one device: {peak.flops / 1e12:.3g} TFLOP/s ({peak.source})")
    if checkpoint:
        console.print(beginning.in_words(progress.step, layout_of(engine)))

    steps = config.training.steps
    last = steps if stop_at is None else min(steps, stop_at)
    if progress.step >= last:
        console.print(f"nothing to do: step {progress.step} of {last} is reached")
        return
    if profile is not None and not progress.step < profile <= last:
        console.print(f"no profile: step {profile} is not among {progress.step + 1} to {last}")
    batches = together(
        lambda: Batches(
            config,
            sources,
            mesh,
            device,
            steps=last - progress.step,
            position=progress.position,
            state=progress.data,
            warn=console.warn,
        ),
        device,
    )
    damaged = beginning.damaged
    with (
        batches,
        together(
            lambda: RunLog(config, folder, console, progress.step, launch.rank), device
        ) as log,
        Saver(
            engine,
            checkpoints,
            config,
            last_step=last,
            warn=console.warn,
            damaged=damaged,
            permit=lock.require if lock else lambda: None,
        ) as saver,
    ):
        parts = Parts(
            engine=engine,
            batches=batches,
            held_out=held_out(config, sources, mesh, device),
            learning_rate=make_schedule(config),
            log=log.write,
            advance=console.advance,
            save=saver.save,
            checkpoints=checkpoints,
            profiler=StepProfiler(folder, profile, launch.rank, console.warn),
            bytes_per_token=bytes_per_token(sources),
            peak=peak,
        )
        training_loop(config, parts, progress, last)
    console.print(f"step {progress.step} of {config.training.steps} saved in {checkpoints}")


def make_schedule(config: Config) -> Schedule:
    """The learning rate by step."""
    schedule = config.schedule
    return Schedule(
        kind=schedule.kind,
        peak=config.optimizer.learning_rate,
        total_steps=config.training.steps,
        warmup_steps=schedule.warmup_steps,
        decay_steps=schedule.decay_steps,
        decay_shape=schedule.decay_shape,
        cycle_steps=schedule.cycle_steps,
        minimum_ratio=schedule.minimum_ratio,
    )


def held_out(config: Config, sources: list[Source], mesh: Mesh, device: Any) -> HeldOut | None:
    """The validation splits, if a corpus has one."""
    found = HeldOut(config, sources, mesh, device, "validation")
    return found if found.parts else None


def describe(config: Config, mesh: Mesh, console: Console, cut: Any) -> None:
    """What is about to be trained, in a few lines."""
    model = config.model
    console.print(
        f"{parameter_count(model) / 1e6:,.1f}M parameters, hierarchy {model.hierarchy}, "
        f"{model.sequence_length:,} tokens a window"
    )
    console.print(
        f"{mesh.world_size} processes: tensor {mesh.tensor} x pipeline {mesh.pipeline} x data "
        f"{mesh.data}, ZeRO {config.parallel.zero_stage}, {config.training.precision}"
    )
    if cut:
        micro_batches = config.micro_batches(mesh.world_size)
        console.print(
            f"pipeline cut at layers {cut.parts}: imbalance {cut.imbalance:.3f}, bubble "
            f"{cut.bubble(micro_batches):.1%}"
        )


class RunLog:
    """Where records go: `metrics.jsonl` always, the terminal, and wandb where configured."""

    def __init__(
        self, config: Config, folder: Path, console: Console, step: int, rank: int
    ) -> None:
        self.console = console
        self._metrics: MetricsLog | None = None
        self._wandb: WandbLog | None = None
        if rank == 0:
            try:
                (folder / "config.json").write_text(config.model_dump_json(indent=2) + "\n")
                self._metrics = MetricsLog(folder, step, console.warn)
            except OSError as error:
                raise UserError(f"{folder}: cannot be written: {error}") from None
            if config.logging.wandb_project:
                self._wandb = WandbLog(
                    folder,
                    config.logging.wandb_project,
                    config.logging.wandb_name,
                    config.model_dump(),
                    warn=console.warn,
                )

    def write(self, record: Record) -> None:
        """A logged step, a validation, or a step that was skipped."""
        show: Callable[[Record], None] = self.console.step
        if "validation_loss" in record:
            show = self.console.validation
        elif "skipped" in record:
            show = self.console.skipped
        show(record)
        if self._metrics:
            self._metrics.write(record)
        if self._wandb:
            self._wandb.log(record)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._metrics:
            self._metrics.close()
        if self._wandb:
            self._wandb.finish(exit_code=int(kind is not None))
