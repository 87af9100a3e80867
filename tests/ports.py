"""Ports for processes that tests start."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A port of this machine that nobody listened on just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
