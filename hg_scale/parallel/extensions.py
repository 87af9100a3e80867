"""Compile and load DeepSpeed's extension for CPU collectives, without stale locks.

Torch protects the folder of a compiled extension by a file `lock`. A process that is killed while
it compiles leaves the file behind, and all later processes wait for it forever. An flock, which
the kernel releases with its process, therefore guards the folder first: its holder knows that no
process of hg_scale owns `lock`, and that no other program does if none has the file open.

The extension is built with the `ninja` of this Python, whatever PATH says: another version discards
the build log of the previous one and compiles everything again, which takes a minute.
"""

from __future__ import annotations

import fcntl
import os
import sysconfig
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from deepspeed.comm.torch import build_shm_op
from torch.utils.cpp_extension import _get_build_directory

_POLL = 0.2  # seconds


def is_compiled() -> bool:
    """Whether the extension is compiled; if not, the next start compiles for about a minute."""
    try:
        return any(Path(_get_build_directory("deepspeed_shm_comm", verbose=False)).glob("*.so"))
    except OSError:  # torch reports it when it compiles
        return True


def load_extensions() -> None:
    """Compile or load the extension, one process of a node at a time, before DeepSpeed uses it.

    Waits for no other rank. An error of the folder is left to torch to report.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            folder = Path(_get_build_directory("deepspeed_shm_comm", verbose=False))
            file = stack.enter_context((folder / "hg_scale.lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
            torch_lock = folder / "lock"
            while torch_lock.exists() and is_open_in_a_process(torch_lock):
                time.sleep(_POLL)
            torch_lock.unlink(missing_ok=True)
        scripts = sysconfig.get_path("scripts")
        path = os.environ.get("PATH", os.defpath).split(os.pathsep)
        if path[0] != scripts:
            os.environ["PATH"] = os.pathsep.join([scripts, *path])
        build_shm_op()


def is_open_in_a_process(path: Path) -> bool:
    """Whether any process of this machine whose descriptors are readable has the file open."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(descriptor) == str(path.absolute()):
                return True
    return False
