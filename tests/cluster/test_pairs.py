"""Checkpoints of eight layouts, resumed in each other."""

from __future__ import annotations

import pytest

from tests.cluster.pairs import BOUND, LAYOUTS, Pairs
from tests.world import Worlds

pytestmark = pytest.mark.cluster

ALL = [(writer, reader) for writer in LAYOUTS for reader in LAYOUTS]
# Each layout's checkpoint is resumed in two others; 1, 2, 4 and 8 processes occur.
COVERING = [(LAYOUTS[i], LAYOUTS[(i + shift) % 8]) for shift in (1, 4) for i in range(8)]


@pytest.fixture(scope="module")
def pairs(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return Pairs(worlds, tmp_path_factory.mktemp("pairs"))


def check(pairs: Pairs, writer: str, reader: str, precision: str) -> None:
    deviation = pairs.deviation(writer, reader, precision)
    assert deviation <= (0 if writer == reader else BOUND[precision])


@pytest.mark.parametrize(("writer", "reader"), COVERING)
def test_curve_continues_in_another_layout(pairs: Pairs, writer: str, reader: str) -> None:
    check(pairs, writer, reader, "fp32")


@pytest.mark.slow
@pytest.mark.parametrize(("writer", "reader"), sorted({*ALL} - {*COVERING}))
def test_curve_continues_in_every_other_layout(pairs: Pairs, writer: str, reader: str) -> None:
    check(pairs, writer, reader, "fp32")


@pytest.mark.slow
@pytest.mark.parametrize(("writer", "reader"), ALL)
def test_curve_continues_in_bf16(pairs: Pairs, writer: str, reader: str) -> None:
    check(pairs, writer, reader, "bf16")
