"""Ports for servers and launchers that tests start."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Return a TCP port of this machine that is currently free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
