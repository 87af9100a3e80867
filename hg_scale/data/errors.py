"""The one error of this package."""


class DataError(Exception):
    """Data that cannot be used: one line naming the file, what was expected and what to do."""
