"""Downloads from a local server that breaks off, refuses, or does not run."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import http.server
import io
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator

import numpy as np
import pooch
import pytest

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.download import CORPORA, CorpusArchive, fetch
from hg_scale.data.progress import ProgressBar
from tests.data.preparation.test_in_order import contents
from tests.ports import free_port
from tests.shared import ROOT

TEXT = np.random.default_rng(5).bytes(900_000)  # incompressible
SCRIPT = ROOT / "data_prep" / "download.py"


def zipped(text: bytes, name: str = "made") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, text)
    return buffer.getvalue()


class Store:
    """The content and behaviour of the server, and the number of its requests."""

    def __init__(self) -> None:
        self.content = zipped(TEXT)
        self.breaks = 0  # responses to break off after a third of the file
        self.status = 200
        self.requests = 0
        self.url = ""


class Handler(http.server.BaseHTTPRequestHandler):
    store: Store

    def do_GET(self) -> None:
        store = self.store
        store.requests += 1
        if store.status != 200:
            self.send_error(store.status)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(store.content)))
        self.end_headers()
        end = len(store.content)
        if store.breaks:
            store.breaks -= 1
            end //= 3
        self.wfile.write(store.content[:end])

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
    monkeypatch.setattr(pooch.core.time, "sleep", lambda seconds: None)


def made(url: str) -> CorpusArchive:
    return CorpusArchive("made", url, "sha256", hashlib.sha256(TEXT).hexdigest())


def unserved_url() -> str:
    return f"http://127.0.0.1:{free_port()}/made.zip"


def test_downloaded_once(store, tmp_path):
    path, fetched = fetch(made(store.url), tmp_path / "new" / "folder", ProgressBar())
    assert fetched and path.read_bytes() == TEXT
    assert contents(path.parent) == {"made": TEXT}  # and no other file
    assert fetch(made(store.url), path.parent, ProgressBar()) == (path, False)
    assert store.requests == 1


@pytest.mark.parametrize("breaks", [1, 2])
def test_a_download_that_broke_off_is_retried(store, tmp_path, breaks):
    store.breaks = breaks
    path, _ = fetch(made(store.url), tmp_path, ProgressBar())
    assert contents(tmp_path) == {"made": TEXT} and path.name == "made"
    assert store.requests == breaks + 1


def test_a_server_that_always_breaks_off_is_reported(store, tmp_path):
    store.breaks = 10**9
    with pytest.raises(DataError, match="cannot be downloaded .*more expected") as caught:
        fetch(made(store.url), tmp_path, ProgressBar())
    assert "\n" not in str(caught.value) and store.requests == 3
    assert contents(tmp_path) == {}  # no part of the archive
    store.breaks = 0
    fetch(made(store.url), tmp_path, ProgressBar())
    assert contents(tmp_path) == {"made": TEXT}


def test_a_full_disk_is_an_error_of_the_output(store, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pooch.core.shutil, "move", fail)
    with pytest.raises(OSError, match="No space left"):
        fetch(made(store.url), tmp_path, ProgressBar())


@pytest.mark.parametrize("status", [404, 403, 503])
def test_an_http_error_is_reported(store, tmp_path, status):
    store.status = status
    with pytest.raises(
        DataError, match=rf"made\.zip cannot be downloaded \(HTTP status {status}"
    ) as caught:
        fetch(made(store.url), tmp_path, ProgressBar())
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("url", ["", "no url", "ftps://x/y", "http://[::1", "http://no.invalid./x"])
def test_an_unusable_url_is_reported(tmp_path, url):
    with pytest.raises(DataError, match="cannot be downloaded .*put made.zip or made in") as caught:
        fetch(made(url or unserved_url()), tmp_path, ProgressBar())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["text", "archive"])
def test_files_of_the_user_need_no_network(tmp_path, what):
    if what == "text":
        (tmp_path / "made").write_bytes(TEXT)
    else:
        (tmp_path / "made.zip").write_bytes(zipped(TEXT))
    path, new = fetch(made(unserved_url()), tmp_path, ProgressBar())
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
def test_another_content_is_refused(store, tmp_path, content, message):
    store.content = content
    with pytest.raises(DataError, match=message) as caught:
        fetch(made(store.url), tmp_path, ProgressBar())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()
    # It is refused until the user removes it.
    store.content = zipped(TEXT)
    with pytest.raises(DataError, match=message):
        fetch(made(store.url), tmp_path, ProgressBar())
    (tmp_path / "made.zip").unlink()
    assert fetch(made(store.url), tmp_path, ProgressBar())[0].read_bytes() == TEXT


def test_a_corrupt_text_is_refused(tmp_path):
    (tmp_path / "made").write_bytes(TEXT[:-1])
    with pytest.raises(DataError, match=r"made: its text has sha256"):
        fetch(made(unserved_url()), tmp_path, ProgressBar())


def test_progress_of_the_download_is_shown(store, tmp_path):
    stages, done = [], []

    class Recorder(ProgressBar):
        def begin(self, what, total, before=0):
            super().begin(what, total, before)
            stages.append((what, total))

        def update(self, count):
            super().update(count)
            done.append(count)

    store.breaks = 1
    fetch(made(store.url), tmp_path, Recorder())
    assert stages == [("downloading made.zip", len(store.content))] * 2
    assert done[-1] == len(store.content)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_script_without_a_network(tmp_path):
    done = run("enwik8", "--output", tmp_path, "--url", unserved_url())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("download: http://127.0.0.1:") and done.stderr.count("\n") == 1
    assert f"put enwik8.zip or enwik8 into {tmp_path}" in done.stderr


def test_the_script_refuses_another_text(store, tmp_path):
    store.content = zipped(TEXT, "text8")
    done = run("text8", "--output", tmp_path, "--url", store.url)
    assert (done.returncode, done.stdout) == (2, "")
    assert "text8.zip: its text has md5 " in done.stderr and done.stderr.count("\n") == 1
    assert run("enwik9").returncode == 2


def test_known_corpora():
    assert sorted(CORPORA) == ["enwik8", "text8"]
    for corpus in CORPORA.values():
        assert len(corpus.digest) == 2 * hashlib.new(corpus.algorithm).digest_size
        assert corpus.url.startswith("https://")
        assert dataclasses.replace(corpus, url="x").url == "x"
