"""The one exception for things the user can put right."""


class InputError(Exception):
    """Bad input: the message names the file, tensor or field, what was expected and what to do.

    The command line prints the message alone and exits with code 2.
    """
