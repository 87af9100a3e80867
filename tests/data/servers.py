"""Local stores that fail: an HTTP server that answers as a test says."""

from __future__ import annotations

import functools
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Trouble = Callable[[str, int], str]  # (file, number of the request for it) -> what to do


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `trouble` says "", "refuse", "cut" (half the file) or "stall"."""

    trouble: Trouble
    asked: dict[str, int]
    stalled = 30.0  # seconds

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.asked[name] = self.asked.get(name, 0) + 1
        match self.trouble(name, self.asked[name]):
            case "refuse":
                self.send_error(404)
            case "cut" | "stall" as kind:
                content = (Path(self.directory) / name).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                if kind == "stall":
                    time.sleep(self.stalled)
            case _:
                super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(folder: str, trouble: Trouble = lambda name, number: "") -> Iterator[tuple[str, dict]]:
    """The URL of a server of `folder`, and how often each file was asked for."""
    asked: dict[str, int] = {}
    kind = type("Handler", (_Handler,), {"trouble": staticmethod(trouble), "asked": asked})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(kind, directory=folder)
    )
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
