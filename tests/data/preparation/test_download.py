"""Fetching from a local server that breaks off, changes its mind, or is not there."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import io
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator

import numpy as np
import pytest

from hg_scale.data.errors import DataError
from hg_scale.data.preparation import download
from hg_scale.data.preparation.download import CORPORA, Download, fetch
from hg_scale.data.progress import ProgressBar
from tests.data.preparation.test_in_order import contents
from tests.ports import free_port
from tests.shared import ROOT

TEXT = np.random.default_rng(5).bytes(900_000)  # does not shrink
SCRIPT = ROOT / "data_prep" / "download.py"


def zipped(text: bytes, name: str = "made") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, text)
    return buffer.getvalue()


class Store:
    """What the server has, how it behaves, and what it was asked."""

    def __init__(self) -> None:
        self.content = zipped(TEXT)
        self.tag: str | None = '"one"'
        self.ranges = True
        self.breaks = 0  # answers to break off after a third of the file
        self.status = 200
        self.shifted = 0  # by how much the parts it sends begin too late
        self.asked: list[str | None] = []  # the Range of every request
        self.sent = 0
        self.url = ""


class Handler(http.server.BaseHTTPRequestHandler):
    store: Store

    def do_GET(self) -> None:
        store = self.store
        asked = self.headers.get("Range")
        store.asked.append(asked)
        if store.status != 200:
            self.send_error(store.status)
            return
        begin, content = 0, store.content
        same = self.headers.get("If-Range") == store.tag
        if store.ranges and asked and same:
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
            if begin >= len(content):
                self.send_error(416)
                return
            begin += store.shifted
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if store.tag:
            self.send_header("ETag", store.tag)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        end = len(content)
        if store.breaks:
            store.breaks -= 1
            end = min(end, begin + len(content) // 3)
        self.wfile.write(content[begin:end])
        store.sent += end - begin

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def store() -> Iterator[Store]:
    found = Store()
    kind = type("Serving", (Handler,), {"store": found})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found.url = f"http://127.0.0.1:{server.server_port}/made.zip"
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_PAUSE", 0.0)


def made(url: str) -> Download:
    return Download("made", url, len(TEXT), "sha256", hashlib.sha256(TEXT).hexdigest())


def nowhere() -> str:
    """A URL that no one serves."""
    return f"http://127.0.0.1:{free_port()}/made.zip"


def test_fetched_once_and_then_there(store, tmp_path):
    path, fetched = fetch(made(store.url), tmp_path / "new" / "folder", ProgressBar())
    assert fetched and path.read_bytes() == TEXT
    assert contents(path.parent) == {"made": TEXT}  # and nothing else
    assert fetch(made(store.url), path.parent, ProgressBar()) == (path, False)
    assert store.asked == [None]


@pytest.mark.parametrize("breaks", [1, 2])
def test_goes_on_where_a_transfer_broke_off(store, tmp_path, breaks):
    store.breaks = breaks
    path, _ = fetch(made(store.url), tmp_path, ProgressBar())
    assert contents(tmp_path) == {"made": TEXT} and path.name == "made"
    third = len(store.content) // 3
    assert store.asked == [None, *(f"bytes={third * n}-" for n in range(1, breaks + 1))]
    assert store.sent == len(store.content)  # no byte twice


def test_goes_on_in_another_process(store, tmp_path, monkeypatch):
    """What an ended try left is used, though each try of it failed."""
    store.breaks = 1
    with monkeypatch.context() as patch, pytest.raises(DataError, match="more expected"):
        patch.setattr(download, "_TRIES", 1)
        fetch(made(store.url), tmp_path, ProgressBar())
    assert not (tmp_path / "made").exists() and not (tmp_path / "made.zip").exists()
    fetch(made(store.url), tmp_path, ProgressBar())
    assert contents(tmp_path) == {"made": TEXT}
    assert store.sent == len(store.content)


def test_a_file_that_changed_is_fetched_whole(store, tmp_path):
    store.breaks, other = 1, zipped(TEXT[::-1])
    sound = store.content
    store.content, store.tag = other, '"two"'
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError):
        patch.setattr(download, "_TRIES", 1)
        fetch(made(store.url), tmp_path, ProgressBar())
    store.content, store.tag = sound, '"one"'
    fetch(made(store.url), tmp_path, ProgressBar())
    assert contents(tmp_path) == {"made": TEXT}


@pytest.mark.parametrize("lack", ["ranges", "tag"])
def test_a_server_without_ranges_is_asked_for_all_again(store, tmp_path, lack):
    store.breaks = 1
    setattr(store, lack, None)
    fetch(made(store.url), tmp_path, ProgressBar())
    assert contents(tmp_path) == {"made": TEXT}
    assert store.sent == len(store.content) // 3 + len(store.content)


def test_a_server_that_always_breaks_off_is_given_up(store, tmp_path):
    store.breaks, store.ranges = 10**9, False
    with pytest.raises(DataError, match="cannot be fetched") as caught:
        fetch(made(store.url), tmp_path, ProgressBar())
    assert "\n" not in str(caught.value) and len(store.asked) == 5


def test_another_part_than_asked_for_is_not_appended(store, tmp_path):
    store.breaks, store.shifted = 1, 1
    fetch(made(store.url), tmp_path, ProgressBar())
    assert contents(tmp_path) == {"made": TEXT}


def test_a_part_longer_than_the_file_is_dropped(store, tmp_path):
    (tmp_path / "made.zip.partial").write_bytes(store.content + b"more")
    (tmp_path / "made.zip.partial.version").write_text('"one"')
    fetch(made(store.url), tmp_path, ProgressBar())
    assert contents(tmp_path) == {"made": TEXT}
    assert store.asked == [f"bytes={len(store.content) + 4}-", None]


@pytest.mark.parametrize("status", [404, 403, 503])
def test_a_server_that_refuses(store, tmp_path, status):
    store.status = status
    with pytest.raises(DataError, match=r"made\.zip cannot be fetched .*by hand") as caught:
        fetch(made(store.url), tmp_path, ProgressBar())
    assert "\n" not in str(caught.value) and len(store.asked) == 1
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("url", ["", "no url", "ftps://x/y", "http://[::1", "http://no.invalid./x"])
def test_what_is_no_url(tmp_path, url):
    with pytest.raises(DataError, match="cannot be fetched .*place made.zip or made in") as caught:
        fetch(made(url or nowhere()), tmp_path, ProgressBar())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["text", "archive"])
def test_placed_by_hand(tmp_path, what):
    """Taken without a network."""
    if what == "text":
        (tmp_path / "made").write_bytes(TEXT)
    else:
        (tmp_path / "made.zip").write_bytes(zipped(TEXT))
    path, new = fetch(made(nowhere()), tmp_path, ProgressBar())
    assert contents(tmp_path) == {"made": TEXT} and new == (what == "archive")
    assert path == tmp_path / "made"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zipped(TEXT[1:]), r"made\.zip: its text has sha256 .*, made has .*; remove it"),
        (zipped(TEXT, "other"), r"made\.zip: is not the archive of made \(.*no item named"),
        (b"<html>log in first</html>", r"made\.zip: is not the archive of made \(File is not a"),
        (zipped(TEXT)[:-500], r"made\.zip: is not the archive of made"),
        (b"", r"made\.zip: is not the archive of made"),
    ],
)
def test_what_came_is_something_else(store, tmp_path, content, message):
    store.content = content
    with pytest.raises(DataError, match=message) as caught:
        fetch(made(store.url), tmp_path, ProgressBar())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()
    # It is not taken the next time either, until it is removed.
    store.content = zipped(TEXT)
    with pytest.raises(DataError, match=message):
        fetch(made(store.url), tmp_path, ProgressBar())
    (tmp_path / "made.zip").unlink()
    assert fetch(made(store.url), tmp_path, ProgressBar())[0].read_bytes() == TEXT


def test_a_damaged_text_is_not_taken(tmp_path):
    (tmp_path / "made").write_bytes(TEXT[:-1])
    with pytest.raises(DataError, match=r"made: its text has sha256"):
        fetch(made(nowhere()), tmp_path, ProgressBar())


def test_progress_counts_the_bytes_that_were_there(store, tmp_path):
    seen = []

    class Recorder(ProgressBar):
        def begin(self, what, total, before=0):
            super().begin(what, total, before)
            seen.append((what, total, before))

    store.breaks = 1
    fetch(made(store.url), tmp_path, Recorder())
    size = len(store.content)
    assert seen == [
        ("fetching made.zip", size, 0),
        ("fetching made.zip", size, size // 3),
        ("unpacking made.zip", len(TEXT), 0),
    ]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_script_without_a_network(tmp_path):
    done = run("enwik8", "--output", tmp_path, "--url", nowhere())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("download: http://127.0.0.1:") and done.stderr.count("\n") == 1
    assert f"place enwik8.zip or enwik8 in {tmp_path} by hand" in done.stderr


def test_the_script_takes_no_other_text(store, tmp_path):
    store.content = zipped(TEXT, "text8")
    done = run("text8", "--output", tmp_path, "--url", store.url)
    assert (done.returncode, done.stdout) == (2, "")
    assert "text8.zip: its text has md5 " in done.stderr and done.stderr.count("\n") == 1
    assert run("enwik9").returncode == 2


def test_known_corpora():
    assert sorted(CORPORA) == ["enwik8", "text8"]
    for corpus in CORPORA.values():
        assert len(corpus.digest) == 2 * hashlib.new(corpus.algorithm).digest_size
        assert corpus.url.startswith("https://") and corpus.size == 10**8
        assert dataclasses.replace(corpus, url="x").url == "x"
