"""The one error of this package."""

from hg_scale.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read: names the file, rank or tensor, and a remedy."""
