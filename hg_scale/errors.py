"""The root of all faults that a person can mend."""

from hg_scale.exit_codes import FAILED


class UserError(Exception):
    """Said in one line (or one line a fault), without a traceback; training ends with its code."""

    exit_code = FAILED
