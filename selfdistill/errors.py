"""The error that is meant for the person at the keyboard."""


class UserError(ValueError):
    """Something the user wrote is wrong. The message says which key, file or line, and what to write instead.

    Entry points print the message alone, without a traceback, and exit with code 2.
    """
