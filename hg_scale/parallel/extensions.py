"""The extension that DeepSpeed compiles for itself on a CPU: no start waits for a dead process.

Torch guards its folder of compiled extensions by a file, `lock`, which a process that is killed
there leaves behind; all that come later then wait for ever. The kernel's lock ends with its
process: who holds it knows that such a file has no owner.

It is built by the `ninja` of this Python, whatever else is on the path: another version throws away
the log of the one before, and compiles all again, which takes a minute.
"""

from __future__ import annotations

import fcntl
import os
import sysconfig
from contextlib import ExitStack, suppress
from pathlib import Path

from deepspeed.comm.torch import build_shm_op
from torch.utils.cpp_extension import _get_build_directory


def load_extensions() -> None:
    """Compile or load it, one process of a node at a time; DeepSpeed then finds it loaded.

    Nothing in here waits for other ranks. A folder that cannot be written is left to torch.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            folder = Path(_get_build_directory("deepspeed_shm_comm", verbose=False))
            file = stack.enter_context((folder / "hg_scale.lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
            (folder / "lock").unlink(missing_ok=True)
        ours = sysconfig.get_path("scripts")
        places = os.environ.get("PATH", os.defpath).split(os.pathsep)
        if places[0] != ours:
            os.environ["PATH"] = os.pathsep.join([ours, *places])
        build_shm_op()
