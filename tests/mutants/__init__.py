"""Planted faults: mistakes that a programmer could make, and the tests that must notice each.

`python -m tests.mutants` plants them one at a time (`runner.py`); the lists are by package.
"""

from __future__ import annotations

from tests.mutants.data import DATA
from tests.mutants.files import FILES
from tests.mutants.model import MODEL
from tests.mutants.mutant import Mutant
from tests.mutants.parallel import PARALLEL
from tests.mutants.training import TRAINING

MUTANTS: tuple[Mutant, ...] = (*MODEL, *PARALLEL, *TRAINING, *FILES, *DATA)
