"""Byte streams of a corpus: a file, a URL or a pipe, with a timeout on every read."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import time
from typing import Any

from hg_scale.data.urls import CURL_SCHEMES, curl_error, open_curl, shown_url

DEFAULT_TIMEOUT = 60.0  # seconds without a byte, after which a read has failed


class ByteStream:
    """A file or pipe opened by webdataset, or a URL read by curl.

    Closing does not wait, and reports nothing: a pipe closed early exits with a signal. Whether
    everything was read is checked against the index instead.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self._timeout, self._killed = timeout, False
        self._opened: Any
        self._file: Any
        self._curl: subprocess.Popen[bytes] | None = None
        self._process: Any
        # Unbuffered, so that `poll` sees all that is left.
        if url.partition("://")[0] in CURL_SCHEMES and "GOPEN_REWRITE" not in os.environ:
            self._process = self._curl = open_curl(url)
            self._opened = self._file = self._curl.stdout
        else:
            from webdataset.gopen import gopen  # imports torch where it is allowed to

            self._opened = gopen(url, bufsize=0)
            self._process = getattr(self._opened, "proc", None)
            self._file = self._opened.stream if self._process else self._opened
        self.seekable = self._process is None
        if self._process:
            self._poll = select.poll()
            self._poll.register(self._file, select.POLLIN)

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes. Raises OSError where a pipe times out or fails."""
        if self._process:
            self._wait()
        data = self._file.read(size)
        if self._process and not data and size:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if status := self._process.wait(self._timeout):
                    if self._curl and status > 0:
                        raise OSError(curl_error(status, self._curl.stderr))
                    command = self._process.args  # a list for curl and the like
                    name = "the command" if isinstance(command, str) else command[0]
                    raise OSError(f"{name} ended with exit code {status}")
        return data

    def seek(self, position: int) -> None:
        self._file.seek(position)

    def kill(self) -> None:
        """Kill the process behind a pipe; a read in another thread then fails."""
        self._killed = True
        if self._process:
            self._process.kill()

    def _wait(self) -> None:
        """Wait for data. The children of a killed shell may hold the pipe open."""
        deadline = time.monotonic() + self._timeout
        while not self._poll.poll(200):
            if self._killed:
                raise OSError("ended")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no data for {self._timeout:g} seconds")

    def close(self) -> None:
        self.kill()
        with contextlib.suppress(OSError):
            self._opened.close()
        if self._curl:
            for pipe in (self._curl.stdin, self._curl.stderr):
                if pipe:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self._curl.wait()


def read_error_line(error: Exception) -> str:
    """Return the message of a failed read, of webdataset or the system, as one line."""
    text = str(error) or type(error).__name__
    # webdataset appends the stream's repr after an @
    return shown_url(text.split(" @ ")[0].splitlines()[0])
