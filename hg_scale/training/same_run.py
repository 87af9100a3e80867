"""All ranks of a world train the same run: compared once, before anything is written.

Ranks can differ without noticing: an old copy of the configuration on one node, another version of
the code, another run folder, or ranks of two launches that met at one port.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist

import hg_scale
from hg_scale.config.schema import Config
from hg_scale.errors import UserError
from hg_scale.exit_codes import CONFIG_ERROR
from hg_scale.parallel.rendezvous import name_ranks
from hg_scale.training.agreement import stop_all

_NAMED = 4  # differences named in the message; the others are counted

# What each launcher sets to the same value on all ranks of one launch, and to another elsewhere.
_LAUNCH_TOKENS = (
    ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ("TORCHELASTIC_RUN_ID",),
    ("PMIX_NAMESPACE",),
    ("HG_LAUNCH",),
)


class DifferentRuns(UserError):
    """The ranks of this world do not train the same run."""

    exit_code = CONFIG_ERROR


def require_same_run(config: Config, folder: Path, options: Mapping[str, Any]) -> None:
    """Raise DifferentRuns on all ranks, naming what differs and where. A collective.

    options: those of the command line that change what a rank does.
    """
    world_size = dist.get_world_size()
    if world_size == 1:
        return
    identity = run_identity(config, folder, options)
    digests: list[Any] = [None] * world_size
    dist.all_gather_object(digests, hashlib.sha256(repr(identity).encode()).hexdigest())
    if len(set(digests)) > 1:
        by_rank: list[Any] = [None] * world_size
        dist.all_gather_object(by_rank, identity)
        message = f"the ranks do not train the same run: {describe_differences(by_rank)}"
        advice = "start all ranks with the same command, code and files"
        stop_all(DifferentRuns(f"{message}; {advice}"), reporting_rank=0)


def run_identity(config: Config, folder: Path, options: Mapping[str, Any]) -> dict[str, str]:
    """What has to be the same on all ranks, by the name that an error gives it."""
    identity = {key: str(value) for key, value in _flatten(config.model_dump()).items()}
    identity |= {f"--{name.replace('_', '-')}": str(value) for name, value in options.items()}
    identity["the run folder"] = str(folder)  # as named: nodes may mount it elsewhere
    identity["the code"] = f"{hg_scale.__version__} ({code_digest()})"
    for names in _LAUNCH_TOKENS:
        if all(name in os.environ for name in names):
            identity[" and ".join(names)] = ".".join(os.environ[name] for name in names)
    return identity


@cache
def code_digest() -> str:
    """A digest of the package's source files, by which two versions are told apart."""
    root = Path(hg_scale.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def describe_differences(by_rank: list[dict[str, str]]) -> str:
    """Name each key with another value than rank 0's, and the ranks that have it."""
    keys = dict.fromkeys(key for identity in by_rank for key in identity)
    lines = []
    for key in keys:
        ranks: dict[str, list[int]] = {}
        for rank, identity in enumerate(by_rank):
            ranks.setdefault(identity.get(key, "not set"), []).append(rank)
        if len(ranks) > 1:
            values = [f"{value} on {name_ranks(found)}" for value, found in ranks.items()]
            lines.append(f"{key} is {' and '.join(values[:2])}")
    more = len(lines) - _NAMED
    return "; ".join(lines[:_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
