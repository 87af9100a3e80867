"""A reader sees a file before or after it is written, never a part of it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hg_scale import atomic_write
from hg_scale.atomic_write import durable_file, write_atomic, write_durable, write_json

WRITERS: list[Callable[[Path, Any], None]] = [write_atomic, write_durable, write_json]


@pytest.mark.parametrize("write", WRITERS)
def test_readers_never_see_a_part(tmp_path: Path, write: Callable[[Path, Any], None]) -> None:
    path, done = tmp_path / "file", threading.Event()
    texts = [letter * 200_000 for letter in "ab"]
    write(path, texts[0])
    expected = {text if write is not write_json else json.dumps(text) + "\n" for text in texts}

    def rewrite() -> None:
        for number in range(100):
            write(path, texts[number % 2])
        done.set()

    threads = [threading.Thread(target=rewrite) for _ in range(2)]
    for thread in threads:
        thread.start()
    while not done.is_set():
        assert path.read_text() in expected
    for thread in threads:
        thread.join()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("write", WRITERS)
def test_a_failed_write_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, Any], None]
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(atomic_write.Path, "replace", fail)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_an_error_while_writing_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyError), durable_file(tmp_path / "file") as file:
        file.write(b"part")
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_durable_writes_sync_the_file_before_and_the_folder_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        order.append(f"sync {'folder' if path.is_dir() else path.name.split('.')[0]}")
        fsync(descriptor)

    def noted_replace(source: str, target: Path) -> None:
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_durable(tmp_path / "file", "text")
    assert order == ["sync file", "rename", "sync folder"]
