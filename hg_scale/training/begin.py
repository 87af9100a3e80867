"""What a run begins from: the newest checkpoint that every rank sees and whose bytes are right."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hg_scale.checkpoint.find import (
    content_damage,
    damage,
    find_latest,
    read_manifest,
)
from hg_scale.config.schema import Config
from hg_scale.errors import UserError
from hg_scale.training.agreement import together
from hg_scale.training.branch import find_branch
from hg_scale.training.console import Console
from hg_scale.training.same_model import changed_keys, refuse_other_model
from hg_scale.training.state import layout_in_words

_LONG = 4e9  # bytes for each rank to check; that takes some seconds


@dataclass(frozen=True)
class Beginning:
    """A checkpoint to begin from, or None, and the damaged ones that were passed over."""

    checkpoint: Path | None
    damaged: frozenset[Path] = frozenset()

    def in_words(self, step: int, layout: dict[str, int]) -> str:
        """The line that says so, with the layout that wrote it where that is another one."""
        assert self.checkpoint
        line = f"resumed at step {step} from {self.checkpoint}"
        theirs = read_manifest(self.checkpoint).get("layout")
        if theirs in (None, layout):
            return line
        return f"{line}, written by {layout_in_words(theirs)}; now {layout_in_words(layout)}"


def agreed_source(
    config: Config, checkpoints: Path, console: Console, device: torch.device
) -> Beginning:
    """The same on all ranks: what `find_source` gives the first one, checked by all.

    Each rank reads every so-manyth file and compares its checksum; what has changed since it was
    written is passed over as if it were not whole. Raises on all ranks where one does not see that
    checkpoint: each looking for itself, some could begin anew (a folder of their node's own, a
    slow file system) beside others that go on. Else as `find_source`.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    known: dict[Path, str] = {}
    while True:
        lines: list[str] = []
        found = together(
            lambda: find_source(config, checkpoints, known, lines) if rank == 0 else None,  # noqa: B023
            device,
        )
        source = _from_first_rank(found, device)
        if source:
            together(lambda: _look(source, rank), device)  # noqa: B023
            faults: list[Any] = [None] * world
            fault = together(lambda: _damage_here(source, rank, world, console), device)  # noqa: B023
            dist.all_gather_object(faults, fault)
            if fault := next(filter(None, faults), None):
                known[source] = fault
                continue
        for line in lines:
            console.print(line)
        return Beginning(source, frozenset(known))


def find_source(
    config: Config, checkpoints: Path, known: dict[Path, str], lines: list[str]
) -> Path | None:
    """The checkpoint to begin from: the run's newest whole one, or `checkpoint.start_from`.

    `known` are faults of checkpoints that are whole by names and sizes. What there is to tell is
    appended to `lines`. Raises CheckpointError where the run's are all damaged, ConfigError where
    `start_from` is no whole checkpoint, or where either holds another model.
    """
    source = find_latest(checkpoints, lines.append, known)
    if source:
        latest = checkpoints / "latest"
        name = latest.read_text(errors="replace").strip() if latest.is_file() else None
        if name is not None and name != source.name:
            lines.append(f"{latest} names {name or 'nothing'}; taking {source.name}")
        refuse_other_model(config, source)
    else:
        source = find_branch(config, lines.append, known)
    if source:
        manifest = read_manifest(source)
        if changed := changed_keys(config, manifest["config"]):
            lines.append(f"changed since {source.name}: {', '.join(changed)}")
        seed = _seed_of(manifest)
        if seed not in (None, config.training.seed):
            lines.append(
                f"training.seed is {config.training.seed}, that of {source.name} was {seed}: the "
                "data goes on in another order, and some of it may come again"
            )
    return source


def _seed_of(manifest: dict[str, Any]) -> int | None:
    """That of the data's order; None where it is not known, or no data was read in that order."""
    if not manifest["progress"]["position"]:
        return None
    return manifest["config"].get("training", {}).get("seed")


def _from_first_rank(found: Path | None, device: torch.device) -> Path | None:
    chosen = [found]
    dist.broadcast_object_list(chosen, src=0, device=device)
    return chosen[0]


def _look(source: Path, rank: int) -> None:
    if fault := damage(source):
        raise UserError(
            f"rank {rank} does not see the first rank's checkpoint {source} whole ({fault}); "
            "the run folder must be one that all nodes share"
        )


def _damage_here(source: Path, rank: int, world: int, console: Console) -> str | None:
    """This rank's part of the checking; the first one says what takes some seconds."""
    size = sum(file["bytes"] for file in read_manifest(source)["files"])
    if rank == 0 and size / world > _LONG:
        console.print(f"checking {source} ({size / 1e9:,.0f} GB)")
    return content_damage(source, rank, world)
