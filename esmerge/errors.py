"""Exceptions whose messages are for the user, and what is needed to write them."""

from collections.abc import Sequence


class InputError(Exception):
    """Bad input: the message names the file, tensor or field, what was expected and what to do.

    The command line prints the message alone and exits with code 2.
    """


class Interrupted(Exception):  # noqa: N818, like KeyboardInterrupt
    """Ctrl-C in work that can be gone on with; the message says how. The command line exits with code 130."""


def first_line(error: object) -> str:
    """The first line of what another library says, without a full stop at its end; its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def some_of(names: Sequence[str], most: int = 3) -> str:
    """The first few of some names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
