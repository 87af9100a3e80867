"""URLs without their secrets, and the reasons of failed transfers."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator

import pytest

from hg_scale.data.errors import DataError
from hg_scale.data.index import locate, read_index
from hg_scale.data.store import ByteStream
from hg_scale.data.urls import http_reason, shown_url
from tests.ports import free_port


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://host/a/b.tar", "https://host/a/b.tar"),
        ("https://host/a?sig=SECRET&x=1#top", "https://host/a?..."),
        ("https://user:SECRET@host:80/a", "https://...@host:80/a"),
        ("https://host?SECRET", "https://host?..."),
        ("pipe:curl 'ftp://u:SECRET@h/{}?k=SECRET'|cat", "pipe:curl 'ftp://...@h/{}?...'|cat"),
        ("corpora/a?b", "corpora/a?b"),
        ("cannot read http://h/a?t=SECRET (404)", "cannot read http://h/a?... (404)"),
    ],
)  # fmt: skip
def test_shown_urls_have_no_secrets(text, shown):
    assert shown_url(text) == shown and "SECRET" not in shown_url(text)


def test_a_query_stays_at_the_end():
    assert locate("https://h/c/?sig=x%2F", "a.tar") == "https://h/c/a.tar?sig=x%2F"
    assert locate("https://h", "a.tar") == "https://h/a.tar"


def test_reasons():
    assert http_reason(404) == "HTTP status 404 Not Found: check the URL"
    assert http_reason(503).startswith("HTTP status 503 Service Unavailable: the server fails")
    assert http_reason(999) == "HTTP status 999: the server fails, try again later"
    assert http_reason(418) == "HTTP status 418 I'm a Teapot"


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers `/STATUS/...`; 302 leads to a closed port, 200 promises more than it sends."""

    port = 0

    def do_GET(self) -> None:
        status = int(self.path.split("/")[1])
        if status == 200:
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"{")
        elif status == 302:
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{self.port}/?token=SECRET")
            self.end_headers()
        else:
            self.send_error(status)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    _Handler.port = free_port()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://user:SECRET@127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/401", "HTTP status 401 Unauthorized: give credentials that permit access"),
        ("/403?sig=SECRET", "HTTP status 403 Forbidden: give credentials that permit access"),
        ("/404", "HTTP status 404 Not Found: check the URL"),
        ("/503", "HTTP status 503 Service Unavailable: the server fails, try again later"),
        ("/302", "Failed to connect|Couldn't connect"),
        ("/200", "outstanding read data|bytes remaining"),
    ],
)
def test_failed_transfers_say_why(server, path, reason):
    with pytest.raises(DataError, match=reason) as caught:
        read_index(server + path)
    message = str(caught.value)
    assert "SECRET" not in message and "\n" not in message
    assert message.startswith("http://...@127.0.0.1:")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:{port}/c?SECRET", "Failed to connect|Couldn't connect"),
        ("http://no-such-host.invalid/c", "Could not resolve host"),
        ("http://[::1/c", "URL|bracket|IPv6"),
        ("nothing://host/c?SECRET", "no gopen handler"),
    ],
)
def test_failed_connections_say_why(url, reason):
    with pytest.raises(DataError, match=reason) as caught:
        read_index(url.format(port=free_port()))
    assert "SECRET" not in str(caught.value) and "\n" not in str(caught.value)


def test_without_curl(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match="curl, which is not installed"):
        read_index("http://127.0.0.1/x")


def test_a_url_is_no_option_or_second_line(server):
    for url in ("http://127.0.0.1:1/\noutput = /tmp/x", 'http://127.0.0.1:1/"\noutput = "x'):
        with contextlib.closing(ByteStream(url, 10.0)) as stream, pytest.raises(OSError):
            stream.read(10)
