"""The error that is meant for the person at the keyboard."""


class UserError(ValueError):
    """Something the user wrote is wrong: the message says which key or file and line, what is wrong, and what to write instead.

    Entry points print the message alone, without a traceback, and exit with code 2.
    """
