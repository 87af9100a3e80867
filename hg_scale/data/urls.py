"""URLs of a corpus: how they are shown, how they are fetched, and why that failed.

curl does the transfers; its message on stderr gives the reason, an HTTP status or an error of the
connection. Repeats are the caller's (`data.retries`): a repeat inside curl would send bytes twice.
"""

from __future__ import annotations

import re
import subprocess
from contextlib import suppress
from http import HTTPStatus
from typing import IO

CURL_SCHEMES = ("http", "https", "ftp", "ftps", "sftp", "scp")

_CONNECT_TIMEOUT = 30  # seconds
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s'\"<>|;]+")
_STATUS = re.compile(r"returned error: (\d{3})")
_ADVICE = {
    401: "give credentials that permit access",
    403: "give credentials that permit access",
    404: "check the URL",
    410: "check the URL",
    429: "try again later",
}


def shown_url(text: str) -> str:
    """Return a text with its URLs as messages may show them: no password, no query."""
    return _URL.sub(lambda match: _without_secrets(match[0]), text)


def _without_secrets(url: str) -> str:
    head, at, host = url.partition("://")[2].partition("/")[0].rpartition("@")
    scheme, rest = url.split("://", 1)
    rest = rest[len(head) + len(at) :]
    path, query, _ = rest.partition("?")
    path = path.partition("#")[0]
    return f"{scheme}://{'...@' if at and host else ''}{path}{'?...' if query else ''}"


def join_url(base: str, file: str) -> str:
    """Return the URL of a file below `base`; a query, such as a signature, stays at the end."""
    path, mark, query = base.partition("?")
    return f"{path.rstrip('/')}/{file}{mark}{query}"


def open_curl(url: str) -> subprocess.Popen[bytes]:
    """Start curl for a URL. Raises OSError where there is no curl.

    The URL is passed on stdin: arguments are visible to every user of the machine.
    """
    command = [
        "curl", "--fail", "--silent", "--show-error", "--location", "--globoff",
        "--connect-timeout", str(_CONNECT_TIMEOUT), "--config", "-",
    ]  # fmt: skip
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
    except FileNotFoundError:
        raise OSError("URLs are read with curl, which is not installed; install it") from None
    assert process.stdin is not None
    quoted = url.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    with suppress(BrokenPipeError):  # it ended at once; its exit code says why
        process.stdin.write(f'url = "{quoted}"\n'.encode())
        process.stdin.close()
    return process


def curl_error(status: int, stderr: IO[bytes] | None) -> str:
    """Return why curl ended with an exit code, by its message, and what to do."""
    text = stderr.read(1 << 14).decode(errors="replace") if stderr else ""
    lines = [line for line in text.splitlines() if line.startswith("curl: ")]
    message = re.sub(r"^curl: (\(\d+\) )?", "", lines[-1]) if lines else ""
    if found := _STATUS.search(message):
        return http_reason(int(found[1]))
    return shown_url(message) or f"curl ended with exit code {status}"


def http_reason(code: int) -> str:
    """Return `404 Not Found: check the URL`."""
    phrase = f" {HTTPStatus(code).phrase}" if code in set(HTTPStatus) else ""
    advice = _ADVICE.get(code, "the server fails, try again later" if code >= 500 else "")
    return f"HTTP status {code}{phrase}" + (f": {advice}" if advice else "")
