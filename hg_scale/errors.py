"""The root of all faults that a person can mend."""


class UserError(Exception):
    """Said in one line (or one line a fault), without a traceback."""
