"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")

from hypothesis import settings  # noqa: E402

from hg_scale.parallel.extensions import is_compiled  # noqa: E402
from tests.runs import TINY  # noqa: E402
from tests.shared import ROOT  # noqa: E402
from tests.world import Worlds  # noqa: E402

# Examples may be slow on a busy machine.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session", autouse=True)
def compiled_extension() -> None:
    """Compile DeepSpeed's extension before any test whose time is limited starts a run.

    It takes a minute, on a busy machine several.
    """
    if not is_compiled():
        code = "from hg_scale.parallel.extensions import load_extensions; load_extensions(print)"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.fixture(scope="session")
def worlds() -> Iterator[Worlds]:
    """Process groups for tests, shared by the whole session."""
    pool = Worlds()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 40 short documents, prepared by data_prep/prepare_bytes.py."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        text = f"document {number} says: " + "the quick brown fox jumps over the lazy dog. " * 40
        (folder / f"{number:02}.txt").write_text(text)
    output = folder.parent / "shards"
    script = ROOT / "data_prep" / "prepare_bytes.py"
    command = [sys.executable, str(script), "--input", str(folder), "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return output


@pytest.fixture
def config(tmp_path: Path, corpus: Path) -> Path:
    """A configuration file: TINY on the corpus."""
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({**TINY, "data": {"path": str(corpus)}}))
    return path
