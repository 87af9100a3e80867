"""Loss curves equal the golden ones in `golden_curves.json`.

A change that is meant to move them rewrites the file with
`python -m tests.training.test_golden_curve`, and its commit message says so.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.training.models import BY_LEVEL, PAPER, layout, run_layout
from tests.world import Worlds

FILE = Path(__file__).parent / "golden_curves.json"
CASES = {"paper": PAPER, "by_level": BY_LEVEL}
STEPS = 10


@pytest.mark.parametrize("name", CASES)
def test_the_curve_equals_the_golden_one(worlds: Worlds, name: str) -> None:
    expected = json.loads(FILE.read_text())[name]
    curve = worlds.run(1, run_layout, layout(CASES[name]), STEPS)[0]
    for key in ("loss", "grad_norm", "validation"):
        np.testing.assert_allclose(curve[key], expected[key], rtol=2e-4, err_msg=key)


def main() -> None:
    pool = Worlds()
    curves = {n: pool.run(1, run_layout, layout(tree), STEPS)[0] for n, tree in CASES.items()}
    pool.close()
    FILE.write_text(json.dumps(curves, indent=1) + "\n")


if __name__ == "__main__":
    main()
