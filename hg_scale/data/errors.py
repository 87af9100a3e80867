"""The one error of this package."""

from hg_scale.errors import UserError


class DataError(UserError):
    """Data that cannot be used: one line naming the file, what was expected and what to do."""
