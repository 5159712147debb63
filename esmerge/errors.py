"""Exceptions whose messages are for the user, and what is needed to write them."""

import errno
from collections.abc import Sequence

# What is said of work that ended before its end.
GOES_ON = "the same command with --resume goes on"
LESS_MEMORY = "let one work at a time (OMP_NUM_THREADS=1)"
# Errors of the system that tell of a place without room, and what is said of them.
NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the result is larger than the file system or the limit of this process allows (see ulimit -f)",
}


class InputError(Exception):
    """Bad input: the message names the file, tensor or field, what was expected and what to do.

    The command line prints the message alone and exits with code 2.
    """


class WorkerKilled(InputError):  # noqa: N818, like Interrupted
    """One of several processes that worked together was killed, and not by us.

    Args:
        remedy: what to do.
    """

    def __init__(self, remedy: str = LESS_MEMORY) -> None:
        super().__init__(f"a process was killed, most likely because memory ran out: {remedy}.")


class OutOfMemory(InputError):  # noqa: N818, like Interrupted
    """Memory, of a device or of the machine, did not suffice.

    Args:
        what: happened, as the library that noticed says it.
        remedy: what to do.
    """

    def __init__(self, what: object, remedy: str) -> None:
        super().__init__(f"memory ran out ({first_line(what)}): {remedy}.")


class Interrupted(Exception):  # noqa: N818, like KeyboardInterrupt
    """Ctrl-C in work that can be gone on with; the message says how. The command line exits with code 130."""


def first_line(error: object) -> str:
    """The first line of what another library says, without a full stop at its end; its kind if it says nothing.

    A line that ends in a colon is taken with the next one.
    """
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += f" {lines[1].strip()}"
    return lines[0].rstrip(".") if lines else type(error).__name__


def some_of(names: Sequence[str], most: int = 3) -> str:
    """The first few of some names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
