"""Recognise lost connections, GPU failures and out-of-memory errors in exceptions.

gloo, NCCL, CUDA and torch's allocators raise plain RuntimeErrors for most of these, so the text of
the message decides. Each function returns that text shortened to one clause, or None.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
import torch.distributed as dist

# Parts of gloo's messages about a rank that is gone or does not answer.
_GLOO = ("/gloo/", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
# Parts of CUDA's messages about a GPU that is broken or in use, never about a bug in the code.
_GPU = (
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "hardware stack error",
    "busy or unavailable",
)
_CPU_ALLOCATOR = "DefaultCPUAllocator"


def connection_error(error: BaseException) -> str | None:
    """Return the message of a lost connection to other ranks; None for any other error."""
    for link in _chain(error):
        text = str(link) or type(link).__name__
        if isinstance(link, dist.DistError) or (
            type(link) is RuntimeError and any(part in text for part in _GLOO)
        ):
            message = text.splitlines()[0].partition(". This is typically caused")[0]
            return re.sub(r"^\[\S*:\d+\] ", "", message).rstrip(".")  # without gloo's source line
    return None


def gpu_error(error: BaseException) -> str | None:
    """Return the message of a GPU that is broken or in use; None for any other error."""
    for link in _chain(error):
        message = (str(link).splitlines() or [""])[0]
        is_cuda = isinstance(link, RuntimeError) and "CUDA" in message
        if is_cuda and any(part in message for part in _GPU):
            return message
    return None


def out_of_memory(error: BaseException) -> str | None:
    """Return the message of a failed allocation, on a GPU or on the host; None for others."""
    for link in _chain(error):
        message = (str(link) or type(link).__name__).splitlines()[0]
        if isinstance(link, torch.OutOfMemoryError):
            return message.partition(". GPU ")[0].rstrip(".")  # without the GPU's other figures
        if isinstance(link, MemoryError) or "CUDA error: out of memory" in message:
            return message
        if isinstance(link, RuntimeError) and _CPU_ALLOCATOR in message:
            return message[message.index(_CPU_ALLOCATOR) :].partition(". Error code")[0]
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, then its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
