"""The error that a user can fix."""


class UserError(ValueError):
    """Something the user gave is wrong. The message says what, and what to do about it; no traceback is shown."""
