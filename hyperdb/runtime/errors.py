"""The exceptions that mean "the user can fix this"."""


class UserError(ValueError):
    """Bad input: the message names the offending value and says what to do.

    The command line prints it as one line and exits with code 2. Anything else that
    escapes is a bug of ours and keeps its traceback.
    """


class WriteError(UserError):
    """The disk does not take a file: it is full, say. Nobody passes over this as over a bad picture."""


class NonFiniteError(UserError, FloatingPointError):
    """A loss, a latent or a picture became NaN, infinite or too large; the message says which and what to lower."""


def first_line(error: Exception) -> str:
    """Return the first line of what an error of a library says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
