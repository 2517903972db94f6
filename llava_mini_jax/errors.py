"""The one exception for bad input."""


class InputError(ValueError):
    """Bad input: a file, an argument or a config that cannot be used as it is.

    The message is one clear sentence (or a list of them) for the person who gave the input: the
    value, what was expected, where, and what to do. The command line prints it without a traceback
    and exits with status 2.
    """
