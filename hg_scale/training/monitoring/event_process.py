"""The process that sends one event, for `events.py` and `slurm/common.sh`.

Without arguments it reads the target and the message from stdin. With the arguments of `train.py`
after `--event KIND CODE REASON` it sends an event of that run, for a batch script whose ranks are
gone. Prints at most one line, a warning without the target's secrets, to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from hg_scale.arguments import add_override_option, local_path
from hg_scale.config import load_config
from hg_scale.errors import UserError
from hg_scale.training.monitoring.events import EVENT_TIMEOUT, EventSender, Target


def deliver(target: Target, message: dict[str, Any], timeout: float = EVENT_TIMEOUT) -> str | None:
    """Run the command or call the webhook. Returns None, or what went wrong."""
    body = json.dumps(message).encode()
    url = os.path.expandvars(target) if isinstance(target, str) else ""
    if url.startswith(("http://", "https://")):
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=timeout):
                return None
        except Exception as error:  # of the network, or a URL that is none
            cause = getattr(error, "reason", error)
            detail = f"HTTP status {error.code}" if hasattr(error, "code") else _kind_of(cause)
            return f"the webhook of {_host_of(url)} failed: {detail}"
    command = ["/bin/sh", "-c", target] if isinstance(target, str) else target
    name = "the command" if isinstance(target, str) else target[0]
    try:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                process.communicate(body, timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                return f"{name} took more than {timeout:g} s and was ended"
            except OSError:  # it reads no input
                pass
            code = process.wait(timeout)
    except (OSError, ValueError) as error:
        return f"{name} cannot be run: {_kind_of(error)}"
    return f"{name} ended with exit code {code}" if code else None


def _host_of(url: str) -> str:
    try:
        return str(urlsplit(url).hostname)
    except ValueError:
        return "an invalid URL"


def _kind_of(error: object) -> str:
    """Describe an error without its text, which may hold the URL."""
    return getattr(error, "strerror", None) or type(error).__name__


def send_one(arguments: list[str]) -> int:
    """Send one event. Returns 0, since a batch script goes on in any case."""
    if not arguments:
        order = json.loads(sys.stdin.buffer.read())
        target, message = order["target"], order["message"]
        if problem := deliver(target, message):
            print(f"warning: logging.on_event, {message['event']}: {problem}", file=sys.stderr)
        return 0
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--event", nargs=2, metavar=("CODE", "REASON"), required=True)
    parser.add_argument("--config", type=local_path, required=True)
    parser.add_argument("--resolved", type=local_path)
    parser.add_argument("--run", type=local_path, required=True)
    add_override_option(parser)
    options, _ = parser.parse_known_args(arguments)
    kept = options.resolved is not None and options.resolved.is_file()
    try:
        config = load_config(options.resolved if kept else options.config, options.overrides)
    except UserError:
        return 0  # the check of the job has reported it
    sender = EventSender(config.logging.on_event, options.run, config.training.steps)
    sender.send_end(int(options.event[0]), options.event[1])
    return 0


if __name__ == "__main__":
    sys.exit(send_one(sys.argv[1:]))
