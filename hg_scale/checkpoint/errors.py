"""The error of `hg_scale.checkpoint` and `hg_scale.convert`."""

from hg_scale.errors import UserError


class CheckpointError(UserError):
    """A checkpoint cannot be written or read. Names the file, rank or tensor, and what to do."""
