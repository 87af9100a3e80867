"""DeepSpeed's compiled extensions: one process of a node at a time, and none waits for a dead one.

Torch guards its folder of compiled extensions by a file, `lock`, which a process that is killed
there leaves behind; all that come later then wait for ever. The kernel's lock ends with its
process: who holds it knows that such a file has no owner.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from torch.utils.cpp_extension import _get_build_directory

_EXTENSION = "deepspeed_shm_comm"  # the one that DeepSpeed loads by itself, on a CPU


@contextmanager
def compiling_alone() -> Iterator[None]:
    """Around what may compile or load it. A folder that cannot be written is left to torch."""
    with ExitStack() as stack:
        with suppress(OSError):
            folder = Path(_get_build_directory(_EXTENSION, verbose=False))
            file = stack.enter_context((folder / "hg_scale.lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
            (folder / "lock").unlink(missing_ok=True)
        yield
