"""A local HTTP server with errors that a test chooses."""

from __future__ import annotations

import functools
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ChooseError = Callable[[str, int], str]  # (file, number of the request for it) -> error or ""


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `choose_error` returns "", "refuse", "cut" (half the file) or "stall"."""

    choose_error: ChooseError
    requests: dict[str, int]
    stall_seconds = 30.0

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.requests[name] = self.requests.get(name, 0) + 1
        match self.choose_error(name, self.requests[name]):
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
                    time.sleep(self.stall_seconds)
            case _:
                super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(
    folder: str, choose_error: ChooseError = lambda name, number: ""
) -> Iterator[tuple[str, dict[str, int]]]:
    """Serve `folder`; yield the URL, and the number of requests for each file."""
    requests: dict[str, int] = {}
    members = {"choose_error": staticmethod(choose_error), "requests": requests}
    kind = type("Handler", (_Handler,), members)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(kind, directory=folder)
    )
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
