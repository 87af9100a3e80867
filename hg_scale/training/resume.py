"""Which checkpoint a run resumes from, and whether it fits the configuration.

The newest complete checkpoint of the run folder wins, then `checkpoint.start_from`, else the run
starts from scratch. Imports no torch until the ranks have to agree, so that `train.py --check` can
use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.find import (
    find_latest,
    resolve_checkpoint,
    verify_checksums,
    verify_sizes,
)
from hg_scale.checkpoint.manifest import read_manifest
from hg_scale.config.errors import ConfigError, Problem
from hg_scale.config.schema import FREE_MODEL_KEYS, Config, ModelConfig
from hg_scale.errors import UserError

if TYPE_CHECKING:
    import torch

    from hg_scale.training.console import Console

_LARGE = 4e9  # bytes per rank to verify: above this it takes seconds and is announced

# The keys, besides the model's shape and the seed, that change a loss curve in any layout.
_CURVE_KEYS = {
    "optimizer": None,
    "schedule": None,
    "training": {"steps", "global_batch_size", "precision"},
    "model": FREE_MODEL_KEYS,
}


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint to resume from (None: start from scratch) and the corrupt ones skipped."""

    checkpoint: Path | None
    corrupt: frozenset[Path] = frozenset()

    def describe(self, step: int, layout: dict[str, int]) -> str:
        """One line for the console; names the layout that wrote the checkpoint if it differs."""
        from hg_scale.training.state import describe_layout

        assert self.checkpoint
        line = f"resumed at step {step} from {self.checkpoint}"
        written_by = read_manifest(self.checkpoint).get("layout")
        if written_by in (None, layout):
            return line
        return f"{line}, written by {describe_layout(written_by)}; now {describe_layout(layout)}"


def agree_on_resume_point(
    config: Config, checkpoints: Path, console: Console, device: torch.device
) -> ResumePoint:
    """Find the resume point on rank 0 and verify it on all ranks. A collective.

    Each rank verifies the checksums of its share of the files; a checkpoint that has changed since
    it was written is skipped like an incomplete one. Raises UserError on all ranks if one of them
    cannot see the checkpoint: if each rank searched by itself, some could start from scratch (a
    node-local run folder, a slow file system) while others resume.
    """
    import torch.distributed as dist

    from hg_scale.training.agreement import run_on_all_ranks

    rank, world_size = dist.get_rank(), dist.get_world_size()
    known: dict[Path, str] = {}

    def find(lines: list[str]) -> Path | None:
        return find_resume_checkpoint(config, checkpoints, known, lines) if rank == 0 else None

    def require_visible(source: Path) -> None:
        if problem := verify_sizes(source):
            raise UserError(
                f"rank {rank} does not see the checkpoint {source} that rank 0 sees ({problem}); "
                "put the run folder on a file system that all nodes share"
            )

    def verify_share(source: Path) -> str | None:
        size = sum(file["bytes"] for file in read_manifest(source)["files"])
        if rank == 0 and size / world_size > _LARGE:
            console.print(f"verifying {source} ({size / 1e9:,.0f} GB)")
        return verify_checksums(source, rank, world_size)

    while True:
        lines: list[str] = []
        found = [run_on_all_ranks(lambda: find(lines), device)]  # noqa: B023
        dist.broadcast_object_list(found, src=0, device=device)
        source = found[0]
        if source:
            run_on_all_ranks(lambda: require_visible(source), device)  # noqa: B023
            problems: list[Any] = [None] * world_size
            problem = run_on_all_ranks(lambda: verify_share(source), device)  # noqa: B023
            dist.all_gather_object(problems, problem)
            if problem := next(filter(None, problems), None):
                known[source] = problem
                continue
        for line in lines:
            console.print(line)
        return ResumePoint(source, frozenset(known))


def find_resume_checkpoint(
    config: Config, checkpoints: Path, known: dict[Path, str], lines: list[str]
) -> Path | None:
    """The run's newest complete checkpoint, else `checkpoint.start_from`, else None.

    known: why checkpoints are corrupt whose names and sizes are valid. Appends what to print to
    `lines`. Raises CheckpointError if every checkpoint of the run is corrupt, ConfigError if
    `start_from` is no complete checkpoint or either holds another model.
    """
    source = find_latest(checkpoints, lines.append, known)
    if source:
        latest = checkpoints / "latest"
        name = latest.read_text(errors="replace").strip() if latest.is_file() else None
        if name is not None and name != source.name:
            lines.append(f"{latest} names {name or 'nothing'}; using {source.name}")
        refuse_other_model(config, source)
    else:
        source = find_start_checkpoint(config, lines.append, known)
    if source:
        manifest = read_manifest(source)
        if changed := changed_keys(config, manifest["config"]):
            lines.append(f"changed since {source.name}: {', '.join(changed)}")
        seed = _data_seed(manifest)
        if seed not in (None, config.training.seed):
            lines.append(
                f"training.seed is {config.training.seed} but {source.name} used {seed}: the data "
                "continues in another order, and some of it may repeat"
            )
    return source


def find_start_checkpoint(
    config: Config,
    report: Callable[[str], None] = lambda _: None,
    known: Mapping[Path, str] | None = None,
) -> Path | None:
    """The checkpoint that `checkpoint.start_from` names, or None if the key is null.

    `report` and `known` as in `find_latest`. Raises ConfigError if it is not a complete checkpoint
    or holds another model.
    """
    named = config.checkpoint.start_from
    if named is None:
        return None
    if not named:
        raise _unusable("names no folder; null starts from scratch", named)
    try:
        source = resolve_checkpoint(Path(named), report, known)
    except (CheckpointError, OSError) as error:
        raise _unusable(str(error), named) from None
    if problem := (known or {}).get(source) or verify_sizes(source):
        message = f"not a complete checkpoint, such as RUN/checkpoints/step-00001000: {problem}"
        raise _unusable(message, str(source))
    refuse_other_model(config, source)
    return source


def changed_keys(config: Config, before: dict[str, Any]) -> list[str]:
    """List the keys that differ from a checkpoint's and change the loss: `key old -> new`."""
    now = config.model_dump()
    return [
        f"{section}.{key} {before[section][key]} -> {now[section][key]}"
        for section, keys in _CURVE_KEYS.items()
        for key in now[section]
        if (keys is None or key in keys)
        and key in before.get(section, {})
        and before[section][key] != now[section][key]
    ]


def refuse_other_model(config: Config, checkpoint: Path) -> None:
    """Raise ConfigError listing the keys in which a checkpoint's model differs."""
    manifest = read_manifest(checkpoint)
    # A key that is newer than the checkpoint had the meaning of its default.
    saved: dict[str, Any] = ModelConfig().model_dump() | manifest["config"]["model"]
    problems = [
        Problem(
            f"model.{key}",
            f"the checkpoint {checkpoint} has {saved.get(key)!r}; set that, or use another --run",
            value,
        )
        for key, value in config.model.model_dump().items()
        if key not in FREE_MODEL_KEYS and value != saved.get(key)
    ]
    if problems:
        raise ConfigError(problems)


def _data_seed(manifest: dict[str, Any]) -> int | None:
    """The seed of the data order; None if unknown, or if no data was read in that order."""
    if not manifest["progress"]["position"]:
        return None
    return manifest["config"].get("training", {}).get("seed")


def _unusable(why: str, value: str) -> ConfigError:
    return ConfigError([Problem("checkpoint.start_from", why, value)])
