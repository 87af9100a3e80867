"""A process that was killed while it compiled holds up nobody."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from hg_scale.parallel.extensions import compiling_alone


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path / "deepspeed_shm_comm"


def test_the_lock_of_a_dead_process_is_removed(folder: Path) -> None:
    folder.mkdir()
    (folder / "lock").touch()
    with compiling_alone():
        assert not (folder / "lock").exists()


def test_that_of_a_living_one_is_not(folder: Path) -> None:
    inside = threading.Event()

    def other() -> None:
        with compiling_alone():
            inside.set()

    with compiling_alone():
        (folder / "lock").touch()  # as torch does in there
        thread = threading.Thread(target=other)
        thread.start()
        assert not inside.wait(0.3) and (folder / "lock").exists()
    thread.join(10)
    assert inside.is_set()


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with compiling_alone():
        pass
