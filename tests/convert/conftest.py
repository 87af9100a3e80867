"""Fixtures for the tests of conversions."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.convert.trained import TrainedCheckpoint, make
from tests.world import Worlds


@pytest.fixture(scope="session")
def trained(
    worlds: Worlds, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], TrainedCheckpoint]:
    """Return the trained checkpoint of a layout (a key of `LAYOUTS`), made once per layout."""
    made: dict[str, TrainedCheckpoint] = {}

    def get(kind: str) -> TrainedCheckpoint:
        if kind not in made:
            made[kind] = make(worlds, kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get
