"""The error that is meant for the person at the keyboard."""

import re
from typing import Any

LONGEST_VALUE = 200  # characters of a value that a message shows
LONGEST_MESSAGE = 4000
MASK = "***"


class UserError(ValueError):
    """Something the user wrote is wrong. The message says which key, file or line, and what to write instead.

    Entry points print the message alone, without a traceback, and exit with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(bounded(message))


def without_passwords(text: str) -> str:
    """A text whose addresses have `***` in the place of what stands before an `@`: `http://***@host:8000/v1`."""
    return re.sub(r"(\w://)[^/\s@?#'\"]+@", rf"\1{MASK}@", text)


def shortened(text: str, characters: int = LONGEST_VALUE) -> str:
    """A text whose middle is left out where it is longer than so many characters."""
    if len(text) <= characters:
        return text
    half = (characters - 30) // 2
    return f"{text[:half]}…({len(text) - 2 * half:,} characters left out)…{text[-half:]}"


def quoted(value: Any) -> str:
    """A value as a message shows it, as Python writes it; a list or mapping is not written out beyond the limit."""
    return shortened(repr(value))


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its class where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def one_line(text: str) -> str:
    """A text that came out of a file, with line ends and other control characters written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def bounded(message: str) -> str:
    """A message in which no word and no whole is too long to be read, and that any terminal can show."""
    message = without_passwords(message).encode("utf-8", "backslashreplace").decode("utf-8")
    message = re.sub(rf"\S{{{LONGEST_VALUE + 1},}}", lambda word: shortened(word.group()), message)
    return shortened(message, LONGEST_MESSAGE)
