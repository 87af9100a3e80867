"""The list of planted faults fits the code: `make mutants` plants them (tests/mutants)."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import pytest

from tests.mutants import MUTANTS
from tests.mutants.mutant import Mutant
from tests.shared import ROOT


@cache
def text_of(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_text_of_a_planted_fault_occurs_once(mutant: Mutant) -> None:
    assert text_of(mutant.file).count(mutant.old) == 1
    assert mutant.old != mutant.new
    tests = re.findall(r"\S+\.py", mutant.tests)
    assert tests and all((ROOT / test).is_file() for test in tests)


def test_names_of_planted_faults_are_unique() -> None:
    assert len(MUTANTS) >= 60
    assert Counter(mutant.name for mutant in MUTANTS).most_common(1)[0][1] == 1
