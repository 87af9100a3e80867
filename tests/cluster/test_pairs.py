"""Eight layouts that read each other's checkpoints."""

from __future__ import annotations

import pytest

from tests.cluster.pairs import BOUND, LAYOUTS, Pairs
from tests.world import Worlds

pytestmark = pytest.mark.cluster

ALL = [(writer, reader) for writer in LAYOUTS for reader in LAYOUTS]
# Each layout is written by two others and reads two others, with 1, 2, 4 and 8 processes.
COVERING = [(LAYOUTS[i], LAYOUTS[(i + shift) % 8]) for shift in (1, 4) for i in range(8)]


@pytest.fixture(scope="module")
def pairs(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return Pairs(worlds, tmp_path_factory.mktemp("pairs"))


def check(pairs: Pairs, writer: str, reader: str, precision: str) -> None:
    found = pairs.deviation(writer, reader, precision)
    assert found <= (0 if writer == reader else BOUND[precision])


@pytest.mark.parametrize(("writer", "reader"), COVERING)
def test_the_curve_goes_on(pairs: Pairs, writer: str, reader: str) -> None:
    check(pairs, writer, reader, "fp32")


@pytest.mark.slow
@pytest.mark.parametrize(("writer", "reader"), sorted({*ALL} - {*COVERING}))
def test_the_curve_goes_on_in_all_others(pairs: Pairs, writer: str, reader: str) -> None:
    check(pairs, writer, reader, "fp32")


@pytest.mark.slow
@pytest.mark.parametrize(("writer", "reader"), ALL)
def test_the_curve_goes_on_in_bf16(pairs: Pairs, writer: str, reader: str) -> None:
    check(pairs, writer, reader, "bf16")
