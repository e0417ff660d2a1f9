"""The errors that a user can correct; commands print them as one line, without a traceback."""


class UserError(ValueError):
    """Bad input: a setting, a file, a folder or a flag.

    The message names what is wrong, what was found, what was expected and what to do. Any other
    exception is a bug and keeps its traceback.
    """


class DivergedError(UserError, FloatingPointError):
    """Training produced a loss, a parameter or a score that is not finite."""
