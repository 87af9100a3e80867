"""The extension that DeepSpeed compiles for itself on a CPU: no start waits for a dead process.

Torch guards its folder of compiled extensions by a file, `lock`, which a process that is killed
there leaves behind; all that come later then wait for ever. The kernel's lock ends with its
process: who holds it knows that no start of ours is such a file's owner, and that no other program
is once none has it open.

It is built by the `ninja` of this Python, whatever else is on the path: another version throws away
the log of the one before, and compiles all again, which takes a minute.
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

_PAUSE = 0.2  # seconds between two looks


def is_compiled() -> bool:
    """Whether a start finds it, or has to compile for about a minute first."""
    try:
        return any(Path(_get_build_directory("deepspeed_shm_comm", verbose=False)).glob("*.so"))
    except OSError:  # torch tells of it
        return True


def load_extensions() -> None:
    """Compile or load it, one process of a node at a time; DeepSpeed then finds it loaded.

    Nothing in here waits for other ranks. A folder that cannot be written is left to torch.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            folder = Path(_get_build_directory("deepspeed_shm_comm", verbose=False))
            file = stack.enter_context((folder / "hg_scale.lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
            theirs = folder / "lock"
            while theirs.exists() and is_open_somewhere(theirs):
                time.sleep(_PAUSE)
            theirs.unlink(missing_ok=True)
        ours = sysconfig.get_path("scripts")
        places = os.environ.get("PATH", os.defpath).split(os.pathsep)
        if places[0] != ours:
            os.environ["PATH"] = os.pathsep.join([ours, *places])
        build_shm_op()


def is_open_somewhere(path: Path) -> bool:
    """Whether a process of this machine, that one can look into, has the file open."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(descriptor) == str(path.absolute()):
                return True
    return False
