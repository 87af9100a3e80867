"""One training run, from a checked configuration to its last checkpoint."""

from __future__ import annotations

import os
import sys
import traceback
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
from hg_scale.exit_codes import CONFIG_ERROR, DONE, FAILED, GAVE_UP, LOST, REQUEUE
from hg_scale.model.costs import parameter_count
from hg_scale.parallel.launch import Launch
from hg_scale.parallel.mesh import Mesh, make_mesh, start_processes
from hg_scale.parallel.timeouts import Timeouts
from hg_scale.training.agreement import Stopped, together
from hg_scale.training.batches import Batches
from hg_scale.training.begin import agreed_source
from hg_scale.training.console import Console, quiet_libraries
from hg_scale.training.corpora import bytes_per_token, open_sources
from hg_scale.training.device import peak_flops
from hg_scale.training.endings import (
    Lost,
    clear_end,
    fault_of_another,
    lost_connection,
    write_end,
)
from hg_scale.training.guard import GaveUp
from hg_scale.training.held_out import HeldOut
from hg_scale.training.interruption import Interruption, end_of_job
from hg_scale.training.loop import Parts, Progress, Record, training_loop
from hg_scale.training.metrics import MetricsLog
from hg_scale.training.profiling import StepProfiler
from hg_scale.training.run_lock import RunLock
from hg_scale.training.saver import Saver
from hg_scale.training.schedule import Schedule
from hg_scale.training.state import layout_of, load_state
from hg_scale.training.stop_signals import StopSignals
from hg_scale.training.wandb_log import WandbLog
from hg_scale.training.watch import Watch, watching


def train(
    config: Config,
    folder: Path,
    launch: Launch,
    *,
    signals: StopSignals | None = None,
    stop_at: int | None = None,
    profile: int | None = None,
) -> int:
    """Train, or go on where the run folder stands. Returns the exit code.

    A fault that a person can mend ends in one line: the first rank that met it tells it, and the
    others end with it. The process group is left where the ranks did not agree to end: then the
    process is not to end as usual (`leave` of `train.py`).
    """
    interruption = Interruption(signals or StopSignals(), config.training.stop_margin, end_of_job())
    fault: UserError | None = None
    interrupted, agreed = False, True
    with ExitStack() as stack:
        try:
            clear_end(folder, launch.rank)
            log = folder / "logs" / f"rank-{launch.rank}.log"
            terminal = stack.enter_context(quiet_libraries(log))
        except OSError as error:
            print(f"{folder}: rank {launch.rank} cannot write there: {error}", file=sys.stderr)
            return FAILED
        console = Console(config.training.steps, rank=launch.rank, stream=terminal)
        try:
            with console:
                interrupted = _train(
                    config, folder, launch, console, interruption, stop_at, profile
                )
        except KeyboardInterrupt:
            fault = UserError("interrupted; started again, the run goes on from its checkpoint")
            agreed = False
        except Exception as error:
            fault = in_a_line(error, launch, interruption)
            agreed = not isinstance(fault, Lost)
            if fault is None:  # one of ours
                write_end(folder, launch.rank, FAILED, f"{type(error).__name__}: {error}")
                raise
            if fault is not error:
                traceback.print_exc()  # into the rank's log
        if dist.is_initialized() and agreed:
            dist.destroy_process_group()
    if fault is None:
        return REQUEUE if interrupted else DONE
    return tell(fault, folder, launch)


def in_a_line(error: Exception, launch: Launch, interruption: Interruption) -> UserError | None:
    """An error as a person is told it; None where that needs a traceback."""
    if why := lost_connection(error):
        step = interruption.step
        where = "at the start" if step is None else f"at step {step + 1}"
        return Lost(
            f"rank {launch.rank} lost its connection to the others {where}: {why}; the job is to "
            "be started again"
        )
    if isinstance(error, UserError):
        return error
    if interruption.signals.received and interruption.step is None:
        # Slurm signals all that belongs to a job, compilers too.
        return Lost(
            f"rank {launch.rank} was interrupted by {interruption.signals} at the start "
            f"({type(error).__name__}); the job is to be started again"
        )
    return None


def tell(fault: UserError, folder: Path, launch: Launch) -> int:
    """Say what ended the run, where that is this rank's to say; the exit code."""
    if isinstance(fault, Stopped):
        return code_of(fault.__cause__)
    if not isinstance(fault, Lost):
        print(fault, file=sys.stderr)
        write_end(folder, launch.rank, code_of(fault), str(fault))
        return code_of(fault)
    met = fault_of_another(folder, launch.rank, launch.world_size)
    if met is None:
        print(fault, file=sys.stderr)
        return LOST
    if launch.rank == (1 if met.rank == 0 else 0):  # one is enough
        print(f"rank {met.rank} ended by itself, and all with it: {met.line}", file=sys.stderr)
    return met.code


def code_of(fault: BaseException | None) -> int:
    """The exit code of a fault that a person has to look at."""
    if isinstance(fault, GaveUp):
        return GAVE_UP
    return CONFIG_ERROR if isinstance(fault, ConfigError) else FAILED


def _train(
    config: Config,
    folder: Path,
    launch: Launch,
    console: Console,
    interruption: Interruption,
    stop_at: int | None,
    profile: int | None,
) -> bool:
    """Whether it was interrupted, and is to be started again."""
    if config.parallel.tensor > 1:
        # One hardware queue, so that Megatron's asynchronous all-reduce starts before the matrix
        # product that it is to overlap with. CUDA reads it when the device is first used.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = start_processes(launch)
    lock = together(lambda: RunLock(folder) if launch.rank == 0 else None, device)
    with lock or nullcontext(), watching(config, folder, launch, console, device) as watch:
        return _train_alone(
            config, folder, launch, console, interruption, stop_at, profile, device, lock, watch
        )


def _train_alone(
    config: Config,
    folder: Path,
    launch: Launch,
    console: Console,
    interruption: Interruption,
    stop_at: int | None,
    profile: int | None,
    device: torch.device,
    lock: RunLock | None,
    watch: Watch,
) -> bool:
    """Once no other run has the folder, whose `lock` the first rank holds."""
    checkpoints = folder / "checkpoints"
    beginning = agreed_source(config, checkpoints, console, device)
    sources = together(lambda: open_sources(config), device)
    mesh, layers = make_mesh(config.parallel)

    from hg_scale.training.engine import make_engine  # imports DeepSpeed

    engine = make_engine(config, mesh, layers, device, draw=beginning.checkpoint is None)
    watch.attach(engine)
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
        return False
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
            reading=watch.reading,
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
            saver=saver,
            checkpoints=checkpoints,
            interruption=interruption,
            timeouts=Timeouts(config.parallel.timeout, [saver.group]),
            profiler=StepProfiler(folder, profile, launch.rank, console.warn),
            watch=watch,
            bytes_per_token=bytes_per_token(sources),
            peak=peak,
        )
        interrupted = training_loop(config, parts, progress, last)
    if interrupted:
        where = f"saved at step {progress.step}" if progress.step else "before the first step"
        console.print(f"{interrupted}: {where}, to be started again")
        return True
    console.print(f"step {progress.step} of {config.training.steps} saved in {checkpoints}")
    return False


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
