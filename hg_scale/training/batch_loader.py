"""Global batches as tensors on each rank that needs them.

Only the first and the last pipeline stage need tokens. In each of their tensor groups, tensor rank
0 reads the data and broadcasts it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hg_scale.config.errors import ConfigError, Problem
from hg_scale.config.schema import Config
from hg_scale.data.blocks import make_readers
from hg_scale.data.errors import DataError
from hg_scale.data.sequence_schedule import DataSchedule, DataSource, parse_data_state
from hg_scale.data.stream import NO_TOKEN, Batch, TrainingStream, batch_indices
from hg_scale.parallel.mesh import Mesh
from hg_scale.training.agreement import error_flag, raise_flagged, stop_all
from hg_scale.training.corpora import retry_policy

_MEGABYTE = 1 << 20
_MAX_REPORTED = 20  # unusable parts of shards that a rank warns of
_LOW_COVERAGE = 0.95  # of the tokens that an epoch serves: less is worth a warning


class BatchLoader:
    """This rank's part of the global batches, in order.

    Every rank computes the schedule, so each knows the run's position in the data. A read error on
    one rank ends all ranks; with `data.on_fault = skip`, all ranks mask the sequence instead.
    """

    def __init__(
        self,
        config: Config,
        sources: list[DataSource],
        mesh: Mesh,
        device: torch.device,
        *,
        steps: int,
        position: int = 0,
        state: dict[str, Any] | None = None,
        warn: Callable[[str], None] = print,
        reading: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`steps`: number of batches to come. `state`: as `state()` returned it for a checkpoint.

        `reading` is a context that this rank enters to read, and leaves before any collective.

        Raises DataError or ConfigError, identical on all ranks, where the sources do not suffice.
        """
        self.mesh, self.device, self._warn, self._reading = mesh, device, warn, reading
        self._global_batch_size = config.training.global_batch_size
        self._rank_batch_size = self._global_batch_size // mesh.data
        self._length = config.model.sequence_length
        self._skip_errors = config.data.on_fault == "skip"
        self._max_skipped = config.data.max_skipped
        resumed = parse_data_state(state) if state else None
        self.schedule = DataSchedule(
            sources,
            sequence_length=self._length,
            seed=config.training.seed,
            state=resumed,
            position=position,
        )
        self._consumed = self.schedule.first_sequence
        if self.schedule.new_sources and mesh.rank == 0:
            new = ", ".join(self.schedule.new_sources)
            warn(f"sources new to this run start at their first sequence: {new}")
        if mesh.rank == 0:
            self._warn_of_low_coverage()
        self._check_enough_data(steps)
        self.skipped = list(resumed.skipped) if resumed else []  # [sequence of the run, shard], ...
        self.scored = 1.0  # fraction of the last global batch that counts in the loss
        self._reported: set[str] = set()
        self._wait_seconds: list[float] = []
        self.needs_tokens = mesh.is_first_stage or mesh.is_last_stage
        self._stream = None
        if self.needs_tokens and mesh.tensor_rank == 0:
            self._stream = TrainingStream(
                self.schedule,
                make_readers(config.data.workers, retry_policy(config)),
                global_batch_size=self._global_batch_size,
                data_rank=mesh.data_rank,
                data_size=mesh.data,
                batches=steps,
                prefetch_bytes=config.data.prefetch_mb * _MEGABYTE,
            )

    @property
    def position(self) -> int:
        """Tokens consumed by the run, over all ranks."""
        return self.schedule.tokens(self._consumed)

    @property
    def epochs(self) -> dict[str, float]:
        """Epochs of each source so far, with fractions."""
        return self.schedule.epochs(self._consumed)

    def state(self) -> dict[str, Any]:
        """Return the state of the data for a checkpoint."""
        return asdict(self.schedule.state(self._consumed, self.skipped))

    def next(self) -> Tensor | None:
        """Return (B, L + 1) int64 on the device; None on ranks that need no tokens.

        Skipped sequences are all NO_TOKEN. Raises UserError on all ranks if one cannot read.
        """
        with self._reading():
            read, error = self._read()
        skipped = self._agree_on_skipped(read, error)
        first, self._consumed = self._consumed, self._consumed + self._global_batch_size
        self.scored = 1 - len(skipped) / self._global_batch_size
        if skipped:
            self._record_skipped(first, skipped)
        if not self.needs_tokens:
            return None
        shape = (self._rank_batch_size, self._length + 1)
        batch = torch.empty(shape, dtype=torch.int64, device=self.device)
        if read:
            batch.copy_(torch.from_numpy(read.ids))
        broadcast_in_tensor_group(self.mesh, batch)
        start = self.mesh.data_rank * self._rank_batch_size
        if masked := [i - start for i in skipped if 0 <= i - start < self._rank_batch_size]:
            batch[masked] = NO_TOKEN
        return batch

    def waits(self) -> dict[str, float]:
        """Return quantiles of a step's wait for data since the last call, in seconds.

        They are those of the rank with the longest waits. A collective.
        """
        local = np.quantile(self._wait_seconds, [0.5, 0.99]) if self._wait_seconds else np.zeros(2)
        self._wait_seconds = []
        by_rank = torch.zeros(dist.get_world_size(), 2, dtype=torch.float32, device=self.device)
        by_rank[dist.get_rank()] = torch.from_numpy(local)
        if len(by_rank) > 1:
            dist.all_reduce(by_rank)
        slowest = int(by_rank[:, 1].argmax())
        p50, p99 = by_rank[slowest].tolist()
        return {"data_wait_p50": p50, "data_wait_p99": p99, "data_wait_rank": slowest}

    def close(self) -> None:
        """Stop reading."""
        if self._stream:
            self._stream.close()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> tuple[Batch | None, DataError | None]:
        """Return this rank's batch or the error of reading it; (None, None) if it does not read."""
        if not self._stream:
            return None, None
        try:
            batch = self._stream.next_batch()
        except DataError as error:
            return None, error
        except Exception as error:  # a bug; it must reach the all-reduce that the peers wait in
            self._warn(traceback.format_exc())
            what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            return None, DataError(f"reading the data failed ({what}); report the traceback above")
        self._wait_seconds.append(batch.wait_seconds)
        messages = list(dict.fromkeys(batch.errors.values()))
        if messages and not self._skip_errors:
            return None, DataError(messages[0])
        for message in messages:
            if message not in self._reported and len(self._reported) < _MAX_REPORTED:
                self._reported.add(message)
                last = len(self._reported) == _MAX_REPORTED
                more = "; further errors are only counted" if last else ""
                self._warn(f"{message}; its sequences are skipped{more}")
        return batch, None

    def _agree_on_skipped(self, read: Batch | None, error: DataError | None) -> list[int]:
        """Return the indices in the global batch to skip on all ranks. A collective.

        Both ends of a pipeline read the batch, and must skip the same sequences.
        """
        marks = torch.zeros(1 + self._global_batch_size * self._skip_errors, dtype=torch.int32)
        marks[0] = error_flag(error)
        if read and self._skip_errors:
            start = 1 + self.mesh.data_rank * self._rank_batch_size
            marks[[start + i for i in read.errors]] = 1
        if dist.get_world_size() > 1:
            marks = marks.to(self.device)
            dist.all_reduce(marks, op=dist.ReduceOp.MAX)
        flag, *skipped = marks.tolist()
        raise_flagged(flag, error)
        return [i for i, is_skipped in enumerate(skipped) if is_skipped]

    def _record_skipped(self, first: int, indices: list[int]) -> None:
        """Add to the list of skipped sequences; end the run where there are too many."""
        locations = self.schedule.locate(first, self._global_batch_size)
        for i in batch_indices(locations, self._global_batch_size)[0, indices].tolist():
            shard = self.schedule.shard_name(first + i)
            self.skipped.append([self.schedule.number_in_run(first + i), shard])
        if len(self.skipped) > self._max_skipped:
            error = DataError(
                f"{self.skipped[-1][1]}: {len(self.skipped)} sequences skipped, more than "
                f"data.max_skipped {self._max_skipped}: fix the shards named above, or allow more"
            )
            stop_all(error, reporting_rank=0)

    def _warn_of_low_coverage(self) -> None:
        """Warn where many tokens are left out because they fill no sequence at a shard's end."""
        for name, fraction in self.schedule.coverage().items():
            if fraction < _LOW_COVERAGE:
                self._warn(
                    f"{name}: an epoch serves {fraction:.1%} of its training tokens in sequences "
                    f"of {self._length}, the ends of its shards are left out; prepare it with "
                    "larger --shard-tokens to leave out less"
                )

    def _check_enough_data(self, steps: int) -> None:
        """Raise ConfigError where all sources retire before the last step."""
        end, needed = self.schedule.sequences, steps * self._global_batch_size
        if end is not None and end - self._consumed < needed:
            left = end - self._consumed
            problem = Problem(
                "data.sources",
                f"{needed} sequences are left to train on and all sources retire after {left}; let "
                f"one repeat, or set training.steps to end "
                f"{steps - left // self._global_batch_size} steps earlier",
            )
            raise ConfigError([problem])


def broadcast_in_tensor_group(mesh: Mesh, tensor: Tensor) -> None:
    """Broadcast tensor rank 0's values to its tensor group, in place."""
    if mesh.tensor > 1:
        from hg_scale.parallel.megatron import tensor_group

        dist.broadcast(tensor, src=mesh.group("tensor")[0], group=tensor_group())
