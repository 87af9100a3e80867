"""The error type of this package, in a file of its own that imports no numpy."""

from hg_scale.errors import UserError


class DataError(UserError):
    """Data that cannot be used: one line with the file, what was expected and what to do."""
