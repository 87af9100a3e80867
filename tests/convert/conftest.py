"""Fixtures for the tests of conversions."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.convert.trained import Trained, make
from tests.world import Worlds


@pytest.fixture(scope="session")
def trained(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """A trained checkpoint of a kind of layout (see `LAYOUTS`), made once."""
    made: dict[str, Trained] = {}

    def get(kind: str) -> Trained:
        if kind not in made:
            made[kind] = make(worlds, kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get
