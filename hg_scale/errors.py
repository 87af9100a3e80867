"""The base class of all errors that a user can fix."""

from hg_scale.exit_codes import FAILED


class UserError(Exception):
    """Reported in one line (or one per error) without a traceback; training exits with its code."""

    exit_code = FAILED
