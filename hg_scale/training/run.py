"""One training run, from a checked configuration to its last checkpoint."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from hg_scale.checkpoint.run_tokenizer import save_run_tokenizer
from hg_scale.config.schema import Config
from hg_scale.data.errors import DataError
from hg_scale.data.sequence_schedule import DataSource
from hg_scale.errors import UserError
from hg_scale.exit_codes import DONE, FAILED, INTERRUPTED, REQUEUE
from hg_scale.model.costs import parameter_count
from hg_scale.parallel.launch import Launch
from hg_scale.parallel.mesh import make_mesh, start_processes
from hg_scale.training.agreement import StoppedByPeer, run_on_all_ranks
from hg_scale.training.batch_loader import BatchLoader
from hg_scale.training.console import Console, quiet_libraries
from hg_scale.training.corpora import bytes_per_token, open_sources
from hg_scale.training.device import peak_flops
from hg_scale.training.failures import (
    Interrupted,
    LostRank,
    OutOfMemory,
    as_user_error,
    find_ends,
    report_failure,
    write_end,
)
from hg_scale.training.interruption import Interruption, StopSignals, end_of_job
from hg_scale.training.loop import Meter, Trainer
from hg_scale.training.monitoring.events import BATCH_SENDS, EventSender
from hg_scale.training.monitoring.monitor import Monitor, monitor_run
from hg_scale.training.monitoring.run_end import write_run_end
from hg_scale.training.profiling import StepProfiler
from hg_scale.training.resume import ResumePoint, agree_on_resume_point
from hg_scale.training.run_lock import RunFolderLocked, RunLock, describe_living_run
from hg_scale.training.run_log import RunLog
from hg_scale.training.same_run import require_same_run
from hg_scale.training.validation import Validator

if TYPE_CHECKING:
    from hg_scale.training.engine import Engine
    from hg_scale.training.state import TrainingProgress

_NOT_SAVED = "interrupted; the next start resumes from the last checkpoint"


@dataclass
class Run:
    """What to train, and where.

    stop_at, profile: the step to stop after, and the step to profile, if any. began: when this
    start did, in seconds since 1970. events: what `logging.on_event` is told. locked: whether this
    run has the folder, and may change files that another run would read. ending: how it ends.
    progress: the current step, once it is known.
    """

    config: Config
    folder: Path
    launch: Launch
    console: Console
    interruption: Interruption
    stop_at: int | None
    profile: int | None
    began: float
    events: EventSender
    locked: bool = False
    ending: str = ""
    progress: TrainingProgress | None = None

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def last_step(self) -> int:
        """The step after which this start ends."""
        steps = self.config.training.steps
        return steps if self.stop_at is None else min(steps, self.stop_at)


def train(
    config: Config,
    folder: Path,
    launch: Launch,
    *,
    signals: StopSignals | None = None,
    stop_at: int | None = None,
    profile: int | None = None,
) -> int:
    """Train, or resume from the newest checkpoint of the run folder. Returns the exit code.

    An error that a user can fix is reported in one line by the first rank that has it, and ends all
    ranks. If the ranks did not agree to end, the process group is not destroyed, and the process
    has to exit by `exit_process` of `train.py`.
    """
    began = time.time()
    interruption = Interruption(signals or StopSignals(), config.training.stop_margin, end_of_job())
    failure: UserError | None = None
    interrupted, agreed = False, True
    with ExitStack() as stack:
        try:
            earlier = find_ends(folder)
            log = folder / "logs" / f"rank-{launch.rank}.log"
            terminal = stack.enter_context(quiet_libraries(log))
        except OSError as error:
            why = f"rank {launch.rank} cannot write to it: {error.strerror}"
            print(f"{folder}: {why}; choose another --run", file=sys.stderr)
            return FAILED
        console = Console(config.training.steps, rank=launch.rank, stream=terminal)
        events = EventSender(
            config.logging.on_event, folder, config.training.steps, console.warn, terminal.fileno()
        )
        run = Run(config, folder, launch, console, interruption, stop_at, profile, began, events)
        _announce_interrupts(run)
        try:
            with console:
                interrupted = _train_connected(run)
        except KeyboardInterrupt:
            failure = Interrupted(_NOT_SAVED)
            agreed = False
        except Exception as error:
            failure = as_user_error(error, launch, interruption)
            agreed = not isinstance(failure, LostRank | OutOfMemory)
            if failure is None:  # a bug
                reason = f"{type(error).__name__}: {error}"
                _record_rank_end(run, FAILED, reason)
                _record_run_end(run, FAILED, reason)
                raise
            if failure is not error:
                traceback.print_exc()  # into the rank's log
        if failure and not isinstance(failure, LostRank | StoppedByPeer | RunFolderLocked):
            _record_rank_end(run, failure.exit_code, str(failure))
        if dist.is_initialized() and agreed:
            dist.destroy_process_group()
    code, line = REQUEUE if interrupted else DONE, run.ending
    if failure:
        _, code, line = report_failure(failure, folder, launch, earlier)
    _record_run_end(run, code, line)
    return code


def _record_rank_end(run: Run, code: int, line: str) -> None:
    """Record that this rank ends by an error of its own, unless another run has the folder."""
    if run.locked or not describe_living_run(run.folder):
        write_end(run.folder, run.launch.rank, code, line)


def _record_run_end(run: Run, code: int, line: str) -> None:
    """Record on rank 0 how the run ends, once it had the folder, and send the event.

    The batch script sends it instead where there is one, since it knows what follows.
    """
    if run.launch.rank != 0:
        return
    if run.locked:
        write_run_end(run.folder, code, line.partition("\n")[0])
    if BATCH_SENDS not in os.environ and (run.locked or not describe_living_run(run.folder)):
        run.events.send_end(code, line, run.progress.step if run.progress else None)


def _announce_interrupts(run: Run) -> None:
    """Print what Ctrl-C does, on rank 0; the second one ends this process."""
    signals, rank = run.interruption.signals, run.launch.rank

    def say(line: str) -> None:
        if rank == 0:  # Ctrl-C reaches the ranks of this terminal all at once
            run.console.print_unlocked(line)

    def end_now() -> None:
        if run.locked:
            _record_rank_end(run, INTERRUPTED, _NOT_SAVED)
            _record_run_end(run, INTERRUPTED, _NOT_SAVED)
        say(_NOT_SAVED)
        os._exit(INTERRUPTED)

    signals.on_interrupt = lambda: say("Ctrl-C: saving after this step; again: end at once")
    signals.end_now = end_now


def _train_connected(run: Run) -> bool:
    """Connect the ranks, lock the folder and train. Returns whether the run was interrupted."""
    if run.config.parallel.tensor > 1:
        # One hardware queue, so that Megatron's asynchronous all-reduce starts before the matrix
        # product that it overlaps with. CUDA reads it when the device is first used.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    folder, launch = run.folder, run.launch

    def leave(signal_name: str) -> None:
        again = "" if signal_name == "signal INT" else "; to be started again"
        run.console.print_unlocked(
            f"rank {launch.rank}: {signal_name} while waiting for the other processes, before the "
            f"first step{again}"
        )
        os._exit(REQUEUE if again else INTERRUPTED)

    with run.interruption.signals.end_wait_on_signal(leave):
        device = start_processes(launch, run.console.warn)
    options = {"stop_at": run.stop_at, "profile": run.profile}
    require_same_run(run.config, folder, options)
    lock = run_on_all_ranks(lambda: RunLock(folder) if launch.rank == 0 else None, device)
    monitoring = monitor_run(run.config, folder, launch, run.console, device, run.events)
    run.locked = True
    with lock or nullcontext(), monitoring as monitor:
        resume = agree_on_resume_point(run.config, run.checkpoints, run.console, device)
        sources = run_on_all_ranks(lambda: open_sources(run.config), device)
        engine = build(run, device, draw_weights=resume.checkpoint is None)
        monitor.attach(engine)
        run.progress = progress = restore(run, engine, resume)
        if progress.step >= run.last_step:
            reached = f"step {progress.step} of {run.last_step} is reached"
            more = "raise training.steps" if run.stop_at is None else "raise --stop-at"
            profile = "" if run.profile is None else " to profile a step"
            run.console.print(f"nothing to do: {reached}; {more} or choose another --run{profile}")
            run.ending = reached
            return False
        return fit(run, engine, progress, sources, monitor, lock, resume.corrupt)


def build(run: Run, device: torch.device, draw_weights: bool) -> Engine:
    """Build the engine of this rank; without `draw_weights` its weights are uninitialised."""
    from hg_scale.training.engine import make_engine  # imports DeepSpeed

    config, launch, console = run.config, run.launch, run.console
    mesh, layers = make_mesh(config.parallel)
    # Rank 0 reports for its node, and so do the first ranks of the others.
    report = console.warn if launch.rank and launch.local_rank == 0 else console.print
    engine = make_engine(config, mesh, layers, device, draw_weights, report)
    _describe(run, engine)
    return engine


def restore(run: Run, engine: Engine, resume: ResumePoint) -> TrainingProgress:
    """Load weights, optimizer and counters from the resume point, if there is one."""
    from hg_scale.training.state import TrainingProgress, layout_of, load_state

    if (checkpoint := resume.checkpoint) is None:
        return TrainingProgress()
    progress = run_on_all_ranks(lambda: load_state(engine, checkpoint), engine.device)
    run.console.print(resume.describe(progress.step, layout_of(engine)))
    return progress


def fit(
    run: Run,
    engine: Engine,
    progress: TrainingProgress,
    sources: list[DataSource],
    monitor: Monitor,
    lock: RunLock | None,
    corrupt: frozenset[Path],
) -> bool:
    """Train to the run's last step. Returns whether the run was interrupted before it."""
    last_step, console = run.last_step, run.console
    if run.profile is not None and not progress.step < run.profile <= last_step:
        steps = f"{progress.step + 1} to {last_step}"
        console.print(f"no profile: step {run.profile} is not among {steps}")
    permit = lock.require if lock else lambda: None
    with _trainer(run, engine, progress, sources, monitor, corrupt, permit) as trainer:
        interrupted = trainer.fit(last_step)
    if interrupted:
        state = f"saved at step {progress.step}" if progress.step else "before the first step"
        run.ending = f"{interrupted}: {state}"
        console.print(f"{run.ending}, to be started again")
        return True
    run.ending = f"step {progress.step} of {run.config.training.steps} saved"
    console.print(f"{run.ending} in {run.checkpoints}")
    return False


@contextmanager
def _trainer(
    run: Run,
    engine: Engine,
    progress: TrainingProgress,
    sources: list[DataSource],
    monitor: Monitor,
    corrupt: frozenset[Path],
    permit: Callable[[], None],
) -> Iterator[Trainer]:
    """The trainer and what it works with, all closed at the end."""
    from hg_scale.training.checkpointer import Checkpointer

    config, folder, console, last_step = run.config, run.folder, run.console, run.last_step
    mesh, device = engine.mesh, engine.device
    run_on_all_ranks(lambda: _keep_tokenizer(run, sources) if mesh.rank == 0 else None, device)
    peak = peak_flops(config.training.precision, device.type)
    console.print(f"peak of one device: {peak.flops / 1e12:.3g} TFLOP/s ({peak.source})")

    def make_loader() -> BatchLoader:
        return BatchLoader(
            config,
            sources,
            mesh,
            device,
            steps=last_step - progress.step,
            position=progress.position,
            state=progress.data,
            warn=console.warn,
            reading=monitor.reading,
        )

    with (
        run_on_all_ranks(make_loader, device) as loader,
        run_on_all_ranks(
            lambda: RunLog(
                config,
                folder,
                console,
                progress.step,
                mesh.rank,
                ranks=mesh.world_size,
                began=run.began,
                events=run.events if mesh.rank == 0 else None,
            ),
            device,
        ) as log,
        Checkpointer(
            engine,
            run.checkpoints,
            config,
            last_step=last_step,
            warn=console.warn,
            corrupt=corrupt,
            permit=permit,
        ) as checkpointer,
        monitor.training(),
    ):
        yield Trainer(
            config,
            engine,
            progress,
            loader=loader,
            validator=Validator(config, sources, mesh, device, "validation"),
            checkpointer=checkpointer,
            log=log,
            monitor=monitor,
            interruption=run.interruption,
            profiler=StepProfiler(folder, run.profile, mesh.rank, console.warn),
            meter=Meter(config, bytes_per_token(sources), peak.flops * mesh.world_size),
        )


def _keep_tokenizer(run: Run, sources: list[DataSource]) -> None:
    """Copy the tokenizer, which is the same for all sources, into the run folder."""
    try:
        save_run_tokenizer(run.folder, sources[0].index.open_tokenizer())
    except DataError as error:
        run.console.warn(f"{error}; the run continues without a copy of its tokenizer")


def _describe(run: Run, engine: Engine) -> None:
    """Print the model, the layout and the pipeline cut."""
    config, mesh, model = run.config, engine.mesh, run.config.model
    run.console.print(
        f"{parameter_count(model) / 1e6:,.1f}M parameters, hierarchy {model.hierarchy}, "
        f"sequences of {model.sequence_length:,} tokens"
    )
    run.console.print(
        f"{mesh.world_size} processes: tensor {mesh.tensor} x pipeline {mesh.pipeline} x data "
        f"{mesh.data}, ZeRO {config.parallel.zero_stage}, {config.training.precision}"
    )
    if cut := engine.cut:
        micro_batches = config.micro_batches(mesh.world_size)
        run.console.print(
            f"pipeline cut at layers {cut.parts}: imbalance {cut.imbalance:.3f}, bubble "
            f"{cut.bubble(micro_batches):.1%}"
        )
