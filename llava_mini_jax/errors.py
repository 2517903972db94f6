"""The one exception for bad input, and values of strangers as its sentences show them."""

import reprlib


class InputError(ValueError):
    """Bad input: a file, an argument or a config that cannot be used as it is.

    The message is one clear sentence (or a list of them) for the person who gave the input: the
    value, what was expected, where, and what to do. The command line prints it without a traceback
    and exits with status 2.
    """


def short(value: object, limit: int = 120) -> str:
    """`repr` of a value from a file that nobody vouches for, fit for a message.

    It stops early, and not after: values that hold each other make a `repr` that never ends.
    """
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = limit
    brief.maxlevel, brief.maxdict, brief.maxlist, brief.maxtuple = 3, 8, 8, 8
    try:
        text = brief.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[:limit] + "..."
