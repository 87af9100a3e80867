"""The checkpoint that a new run branches off: `checkpoint.start_from`. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.find import damage, newest_of
from hg_scale.config.errors import ConfigError, Problem
from hg_scale.config.schema import Config
from hg_scale.training.same_model import refuse_other_model


def find_branch(
    config: Config,
    report: Callable[[str], None] = lambda _: None,
    known: Mapping[Path, str] | None = None,
) -> Path | None:
    """The checkpoint, or None where the key names none; `report` and `known` as `find_latest`.

    Raises ConfigError where it is not whole, or holds another model.
    """
    named = config.checkpoint.start_from
    if named is None:
        return None
    if not named:
        raise _unusable("names no folder; null begins from scratch", named)
    try:
        source = newest_of(Path(named), report, known)
    except (CheckpointError, OSError) as error:
        raise _unusable(str(error), named) from None
    if fault := (known or {}).get(source) or damage(source):
        message = f"not a whole checkpoint, such as RUN/checkpoints/step-00001000: {fault}"
        raise _unusable(message, str(source))
    refuse_other_model(config, source)
    return source


def _unusable(why: str, value: str) -> ConfigError:
    return ConfigError([Problem("checkpoint.start_from", why, value)])
