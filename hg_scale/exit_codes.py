"""What the exit code of a training run means to whatever started it.

`slurm/common.sh` acts on these codes and `docs/slurm.md` explains them; a test holds all three
together. Imports nothing, so that anything may import it.

All ranks agree before they end with one of them. `srun` hands the batch script the highest code of
all ranks, and a killed rank counts as 128 and its signal: whatever is above 128 is a lost rank.
"""

DONE = 0
"""Trained to the last step that was asked for, and saved."""

FAILED = 1
"""A fault that a person has to look at, told in one line. Not requeued."""

CONFIG_ERROR = 2
"""A configuration or command line that cannot be used. Never requeued."""

REQUEUE = 75
"""Saved before the end (preemption, time limit): start me again. `EX_TEMPFAIL` of sysexits.h."""

LOST = 76
"""A rank, node, GPU or link was lost, or a step hung: start me again from the last checkpoint."""

GAVE_UP = 77
"""Trying again would not help, as after too many steps that are not finite. Not requeued."""

MEANINGS = {
    DONE: "done",
    FAILED: "failed: see the last lines of the log",
    CONFIG_ERROR: "the configuration cannot be used",
    REQUEUE: "saved, to be started again",
    LOST: "lost a rank or a node",
    GAVE_UP: "gave up",
}


def meaning(code: int) -> str:
    """A code in words; what a signal ended counts as lost."""
    if code > 192:  # beyond all signals: of srun's own
        return MEANINGS[LOST]
    if code > 128:
        return f"{MEANINGS[LOST]} (signal {code - 128})"
    return MEANINGS.get(code, f"unknown exit code {code}")


def starts_again(code: int) -> bool:
    """Whether the launcher requeues a job that ended so."""
    return code in (REQUEUE, LOST) or code > 128
