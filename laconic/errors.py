"""The one exception a user of Laconic has to know."""


class LaconicError(Exception):
    """Something the user can mend. The message is one sentence that says what is wrong and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def quote(value: object, limit: int = 60) -> str:
    """What the user wrote, in quotes, on one line and of bearable length, for use in a message."""
    text = " ".join(str(value).split())
    return f"'{text if len(text) <= limit else text[: limit - 3] + '...'}'"
