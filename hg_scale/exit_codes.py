"""Exit codes of a training run.

`slurm/common.sh` acts on these codes and `docs/slurm.md` explains them; a test compares all three.
Imports nothing, so that any module may import it.

All ranks agree on one of the codes before they exit. `srun` returns the highest code of all ranks,
and a killed rank counts as 128 plus its signal: a code above 128, but for Ctrl-C, is a lost rank.
"""

DONE = 0
"""Trained to the last requested step, and saved."""

FAILED = 1
"""An error that a user has to fix, reported in one line. Not requeued."""

CONFIG_ERROR = 2
"""An invalid configuration or command line. Never requeued."""

REQUEUE = 75
"""Saved before the end (preemption, time limit); to be restarted. EX_TEMPFAIL of sysexits.h."""

LOST = 76
"""A rank, node, GPU or link was lost, or a step hung; to be restarted from the last checkpoint."""

GAVE_UP = 77
"""A restart would not help, as after too many non-finite steps. Not requeued."""

INTERRUPTED = 130
"""Ended by Ctrl-C at once, without a save. Not requeued. 128 plus SIGINT, as of a shell."""

MEANINGS = {
    DONE: "done",
    FAILED: "failed: see the last lines of the log",
    CONFIG_ERROR: "the configuration cannot be used",
    REQUEUE: "saved, to be started again",
    LOST: "lost a rank or a node",
    GAVE_UP: "gave up",
    INTERRUPTED: "interrupted by Ctrl-C",
}


def meaning(code: int) -> str:
    """Describe an exit code; a process that a signal ended counts as lost."""
    if code in MEANINGS:
        return MEANINGS[code]
    if code > 192:  # above 128 plus any signal: srun's own code
        return MEANINGS[LOST]
    if code > 128:
        return f"{MEANINGS[LOST]} (signal {code - 128})"
    return f"unknown exit code {code}"


def starts_again(code: int) -> bool:
    """Whether the Slurm launcher requeues a job with this exit code."""
    return code in (REQUEUE, LOST) or (code > 128 and code != INTERRUPTED)
