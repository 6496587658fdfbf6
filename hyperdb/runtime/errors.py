"""The exceptions that mean "the user can fix this"."""

from __future__ import annotations

import sys
from collections.abc import Callable


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


def run_script(main: Callable[[list[str]], object]) -> None:
    """Give a script the words of its command line; a `UserError` ends it with one line and exit code 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"{sys.argv[0]}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
