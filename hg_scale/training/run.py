"""One training run, from a checked configuration to its last checkpoint."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hg_scale.checkpoint.run_tokenizer import save_run_tokenizer
from hg_scale.config.schema import Config
from hg_scale.data.errors import DataError
from hg_scale.data.schedule import DataSource
from hg_scale.errors import UserError
from hg_scale.exit_codes import DONE, FAILED, REQUEUE
from hg_scale.model.costs import parameter_count
from hg_scale.parallel.launch import Launch
from hg_scale.parallel.mesh import Mesh, make_mesh, start_processes
from hg_scale.parallel.timeouts import Timeouts
from hg_scale.training.agreement import StoppedByPeer, run_on_all_ranks
from hg_scale.training.batch_loader import BatchLoader
from hg_scale.training.checkpointer import Checkpointer
from hg_scale.training.console import Console, quiet_libraries
from hg_scale.training.corpora import bytes_per_token, open_sources
from hg_scale.training.device import peak_flops
from hg_scale.training.failures import (
    LostRank,
    OutOfMemory,
    as_user_error,
    clear_end,
    report_failure,
    write_end,
)
from hg_scale.training.interruption import Interruption, StopSignals, end_of_job
from hg_scale.training.loop import Parts, training_loop
from hg_scale.training.monitoring.monitor import Monitor, monitor_run
from hg_scale.training.profiling import StepProfiler
from hg_scale.training.resume import agree_on_resume_point
from hg_scale.training.run_lock import RunLock, Taken
from hg_scale.training.run_log import RunLog
from hg_scale.training.schedule import LearningRateSchedule
from hg_scale.training.state import TrainingProgress, layout_of, load_state
from hg_scale.training.validation import Validator


@dataclass(frozen=True)
class Run:
    """What is to be done, and with what."""

    config: Config
    folder: Path
    launch: Launch
    console: Console
    interruption: Interruption
    stop_at: int | None
    profile: int | None


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
            why = f"rank {launch.rank} cannot write there: {error.strerror}"
            print(f"{folder}: {why}; choose another --run", file=sys.stderr)
            return FAILED
        console = Console(config.training.steps, rank=launch.rank, stream=terminal)
        try:
            with console:
                interrupted = _train(
                    Run(config, folder, launch, console, interruption, stop_at, profile)
                )
        except KeyboardInterrupt:
            fault = UserError(
                "interrupted; started again, the run goes on from its last checkpoint"
            )
            agreed = False
        except Exception as error:
            fault = as_user_error(error, launch, interruption)
            agreed = not isinstance(fault, LostRank | OutOfMemory)
            if fault is None:  # one of ours
                write_end(folder, launch.rank, FAILED, f"{type(error).__name__}: {error}")
                raise
            if fault is not error:
                traceback.print_exc()  # into the rank's log
        # The end of one that found the folder taken would pass for that of the run that is there.
        if fault and not isinstance(fault, LostRank | StoppedByPeer | Taken):
            write_end(folder, launch.rank, fault.exit_code, str(fault))
        if dist.is_initialized() and agreed:
            dist.destroy_process_group()
    if fault is None:
        return REQUEUE if interrupted else DONE
    return report_failure(fault, folder, launch)


def _train(run: Run) -> bool:
    """Whether it was interrupted, and is to be started again."""
    if run.config.parallel.tensor > 1:
        # One hardware queue, so that Megatron's asynchronous all-reduce starts before the matrix
        # product that it is to overlap with. CUDA reads it when the device is first used.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    folder, launch = run.folder, run.launch

    def leave(signalled: str) -> None:
        run.console.last_words(
            f"rank {launch.rank}: {signalled} while waiting for the other processes, before the "
            "first step; to be started again"
        )
        os._exit(REQUEUE)

    with run.interruption.signals.ending_a_wait(leave):
        device = start_processes(launch)
    lock = run_on_all_ranks(lambda: RunLock(folder) if launch.rank == 0 else None, device)
    watched = monitor_run(run.config, folder, launch, run.console, device)
    with lock or nullcontext(), watched as watch:
        return _train_alone(run, device, lock, watch)


def _train_alone(run: Run, device: torch.device, lock: RunLock | None, watch: Monitor) -> bool:
    """Once no other run has the folder, whose `lock` the first rank holds."""
    config, folder, console, profile = run.config, run.folder, run.console, run.profile
    checkpoints = folder / "checkpoints"
    beginning = agree_on_resume_point(config, checkpoints, console, device)
    sources = run_on_all_ranks(lambda: open_sources(config), device)
    mesh, layers = make_mesh(config.parallel)

    from hg_scale.parallel.extensions import is_compiled  # imports DeepSpeed
    from hg_scale.training.engine import make_engine

    if device.type == "cpu" and not is_compiled():
        console.print("compiling DeepSpeed's collectives for CPUs, once: about a minute")
    engine = make_engine(config, mesh, layers, device, draw=beginning.checkpoint is None)
    watch.attach(engine)
    progress = TrainingProgress()
    if checkpoint := beginning.checkpoint:
        progress = run_on_all_ranks(lambda: load_state(engine, checkpoint), device)
    peak = peak_flops(config.training.precision, device.type)
    describe(config, mesh, console, engine.cut)
    console.print(f"peak of one device: {peak.flops / 1e12:.3g} TFLOP/s ({peak.source})")
    if checkpoint:
        console.print(beginning.describe(progress.step, layout_of(engine)))

    steps = config.training.steps
    last = steps if run.stop_at is None else min(steps, run.stop_at)
    if progress.step >= last:
        console.print(f"nothing to do: step {progress.step} of {last} is reached")
        return False
    if profile is not None and not progress.step < profile <= last:
        console.print(f"no profile: step {profile} is not among {progress.step + 1} to {last}")
    run_on_all_ranks(lambda: _keep_tokenizer(run, sources) if mesh.rank == 0 else None, device)
    batches = run_on_all_ranks(
        lambda: BatchLoader(
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
        run_on_all_ranks(
            lambda: RunLog(config, folder, console, progress.step, mesh.rank), device
        ) as log,
        Checkpointer(
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
            interruption=run.interruption,
            timeouts=Timeouts(config.parallel.timeout, [saver.group]),
            profiler=StepProfiler(folder, profile, mesh.rank, console.warn),
            watch=watch,
            bytes_per_token=bytes_per_token(sources),
            peak=peak,
        )
        with watch.training():
            interrupted = training_loop(config, parts, progress, last)
    if interrupted:
        where = f"saved at step {progress.step}" if progress.step else "before the first step"
        console.print(f"{interrupted}: {where}, to be started again")
        return True
    console.print(f"step {progress.step} of {config.training.steps} saved in {checkpoints}")
    return False


def _keep_tokenizer(run: Run, sources: list[DataSource]) -> None:
    """All sources have the same."""
    try:
        save_run_tokenizer(run.folder, sources[0].index.open_tokenizer())
    except DataError as error:
        run.console.warn(f"{error}; the run goes on without a copy of its tokenizer")


def make_schedule(config: Config) -> LearningRateSchedule:
    """The learning rate by step."""
    schedule = config.schedule
    return LearningRateSchedule(
        kind=schedule.kind,
        peak=config.optimizer.learning_rate,
        total_steps=config.training.steps,
        warmup_steps=schedule.warmup_steps,
        decay_steps=schedule.decay_steps,
        decay_shape=schedule.decay_shape,
        cycle_steps=schedule.cycle_steps,
        minimum_ratio=schedule.minimum_ratio,
    )


def held_out(
    config: Config, sources: list[DataSource], mesh: Mesh, device: Any
) -> Validator | None:
    """The validation splits, if a corpus has one."""
    found = Validator(config, sources, mesh, device, "validation")
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
