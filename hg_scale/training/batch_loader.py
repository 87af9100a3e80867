"""From the data stream to each rank's tensors.

Only ranks that need tokens get them: the first and the last pipeline stage. Of these the first
rank of a tensor group reads, and gives the others theirs.
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
from hg_scale.data.schedule import DataSchedule, DataSource, DataState
from hg_scale.data.stream import NO_TOKEN, Batch, TrainingStream, rows_of
from hg_scale.parallel.mesh import Mesh
from hg_scale.training.agreement import error_flag, raise_flagged, stop_all
from hg_scale.training.corpora import patience

_MEGABYTE = 1 << 20
_TOLD = 20  # faults that a rank tells
_FEW_LEFT_OUT = 0.95  # of the tokens, served in an epoch: less is worth a warning


class BatchLoader:
    """This rank's share of the global batches, in order.

    Every rank knows the schedule, so each can say where the run stands in its data. What a rank
    cannot read ends all ranks, or (`data.on_fault = skip`) is left out on all of them alike.
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
        """`steps` is how many batches there will be, `state` what a checkpoint carries.

        `reading` is entered while this rank reads, before it meets the others.

        Raises DataError or ConfigError where the sources cannot give them, alike on all ranks.
        """
        self.mesh, self.device, self._warn, self._reading = mesh, device, warn, reading
        self._rows, self._length = config.training.global_batch_size, config.model.sequence_length
        self._mine = self._rows // mesh.data
        self._skips, self._most = config.data.on_fault == "skip", config.data.max_skipped
        resumed = DataState(**state) if state else None
        self.schedule = DataSchedule(
            sources,
            sequence_length=self._length,
            seed=config.training.seed,
            state=resumed,
            position=position,
        )
        self._windows = self.schedule.begin
        if self.schedule.new_sources and mesh.rank == 0:
            new = ", ".join(self.schedule.new_sources)
            warn(f"data new to this run begins at its first window: {new}")
        if mesh.rank == 0:
            self._tell_shares()
        self._check_room(steps)
        self.skipped = list(resumed.skipped) if resumed else []  # [window of the run, shard], ...
        self.scored = 1.0  # share of the last global batch that counts in the loss
        self._told: set[str] = set()
        self._waits: list[float] = []
        self.needed = mesh.is_first_stage or mesh.is_last_stage
        self._stream = None
        if self.needed and mesh.tensor_rank == 0:
            self._stream = TrainingStream(
                self.schedule,
                make_readers(config.data.workers, patience(config)),
                global_batch_size=self._rows,
                data_rank=mesh.data_rank,
                data_size=mesh.data,
                batches=steps,
                prefetch_bytes=config.data.prefetch_mb * _MEGABYTE,
            )

    @property
    def position(self) -> int:
        """Tokens consumed by the run, over all ranks."""
        return self.schedule.tokens(self._windows)

    @property
    def epochs(self) -> dict[str, float]:
        """Passes over each source so far."""
        return self.schedule.epochs(self._windows)

    def state(self) -> dict[str, Any]:
        """What a checkpoint carries."""
        return asdict(self.schedule.state(self._windows, self.skipped))

    def next(self) -> Tensor | None:
        """(rows, L + 1) int64 on the device; None where no tokens are needed.

        The rows of a window left out are all NO_TOKEN. Raises UserError on all ranks where one
        cannot go on.
        """
        with self._reading():
            read, fault = self._read()
        left_out = self._agree(read, fault)
        first, self._windows = self._windows, self._windows + self._rows
        self.scored = 1 - len(left_out) / self._rows
        if left_out:
            self._write_down(first, left_out)
        if not self.needed:
            return None
        shape = (self._mine, self._length + 1)
        batch = torch.empty(shape, dtype=torch.int64, device=self.device)
        if read:
            batch.copy_(torch.from_numpy(read.ids))
        share_in_tensor_group(self.mesh, batch)
        begin = self.mesh.data_rank * self._mine
        if mine := [row - begin for row in left_out if 0 <= row - begin < self._mine]:
            batch[mine] = NO_TOKEN
        return batch

    def waits(self) -> dict[str, float]:
        """Seconds that a step waited for data since the last call, on the rank that waited most.

        A collective operation of all ranks.
        """
        here = np.quantile(self._waits, [0.5, 0.99]) if self._waits else np.zeros(2)
        self._waits = []
        each = torch.zeros(dist.get_world_size(), 2, dtype=torch.float32, device=self.device)
        each[dist.get_rank()] = torch.from_numpy(here)
        if len(each) > 1:
            dist.all_reduce(each)
        worst = int(each[:, 1].argmax())
        p50, p99 = each[worst].tolist()
        return {"data_wait_p50": p50, "data_wait_p99": p99, "data_wait_rank": worst}

    def close(self) -> None:
        """End whatever reads."""
        if self._stream:
            self._stream.close()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> tuple[Batch | None, DataError | None]:
        """This rank's rows where it reads, or why there are none."""
        if not self._stream:
            return None, None
        try:
            batch = self._stream.next_batch()
        except DataError as error:
            return None, error
        except Exception as error:  # of ours; it too must reach the flag that the peers wait for
            self._warn(traceback.format_exc())
            what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            return None, DataError(f"reading the data failed ({what}); report the traceback above")
        self._waits.append(batch.waited)
        messages = list(dict.fromkeys(batch.faults.values()))
        if messages and not self._skips:
            return None, DataError(messages[0])
        for message in messages:
            if message not in self._told and len(self._told) < _TOLD:
                self._told.add(message)
                last = "; further ones are counted only" if len(self._told) == _TOLD else ""
                self._warn(f"{message}; its windows are skipped{last}")
        return batch, None

    def _agree(self, read: Batch | None, fault: DataError | None) -> list[int]:
        """The rows of the global batch to leave out, as all ranks that read found them.

        Both ends of a pipeline read: they must leave out the same.
        """
        marks = torch.zeros(1 + self._rows * self._skips, dtype=torch.int32)
        marks[0] = error_flag(fault)
        if read and self._skips:
            begin = 1 + self.mesh.data_rank * self._mine
            marks[[begin + row for row in read.faults]] = 1
        if dist.get_world_size() > 1:
            marks = marks.to(self.device)
            dist.all_reduce(marks, op=dist.ReduceOp.MAX)
        flag, *rows = marks.tolist()
        raise_flagged(flag, fault)
        return [row for row, left_out in enumerate(rows) if left_out]

    def _write_down(self, first: int, rows: list[int]) -> None:
        """Keep which windows were left out; too many end the run."""
        places = self.schedule.places(first, self._rows)
        for window in rows_of(places, self._rows)[0, rows].tolist():
            name = self.schedule.shard_name(first + window)
            self.skipped.append([self.schedule.window_of_run(first + window), name])
        if len(self.skipped) > self._most:
            fault = DataError(
                f"{self.skipped[-1][1]}: {len(self.skipped)} windows skipped, more than "
                f"data.max_skipped {self._most}: mend the shards named above, or allow more"
            )
            stop_all(fault, reporting_rank=0)

    def _tell_shares(self) -> None:
        """Say where the ends of shards, of which no window can be made, are more than a few."""
        for name, share in self.schedule.shares().items():
            if share < _FEW_LEFT_OUT:
                self._warn(
                    f"{name}: an epoch serves {share:.1%} of its training tokens in windows of "
                    f"{self._length}, the ends of its shards stay out; larger --shard-tokens in "
                    "its preparation leave out less"
                )

    def _check_room(self, steps: int) -> None:
        """Sources that all retire must last."""
        there, windows = self.schedule.windows, steps * self._rows
        if there is not None and there - self._windows < windows:
            problem = Problem(
                "data.sources",
                f"{windows} windows are still to be trained on and all sources retire after "
                f"{there - self._windows} more; let one repeat, or set training.steps to end "
                f"{steps - (there - self._windows) // self._rows} steps earlier",
            )
            raise ConfigError([problem])


def share_in_tensor_group(mesh: Mesh, tensor: Tensor) -> None:
    """Give the first tensor rank's values to the others, in place."""
    if mesh.tensor > 1:
        from hg_scale.parallel.megatron import tensor_group

        dist.broadcast(tensor, src=mesh.group("tensor")[0], group=tensor_group())
