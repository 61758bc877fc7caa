"""Text from outside, made fit for tokenizers, files and terminals: feedback, completions, what a server writes."""

import math
import re
from typing import Any

SURROGATE = re.compile("[\ud800-\udfff]")
# Everything that steers a terminal or turns the direction of writing, apart from line breaks and tabs.
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_UNSHOWABLE = re.compile(f"{STEERING.pattern}|{SURROGATE.pattern}")
REPLACEMENT = "\ufffd"


def whole_characters(text: str) -> str:
    """The text with every lone surrogate, half of a character, replaced by U+FFFD; halves that belong together join.

    No tokenizer and no UTF-8 file takes a lone surrogate, and Python's exceptions and JSON can bring one.
    """
    if text.isascii() or not SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def printable(text: str) -> str:
    """The text as it may be shown on a terminal or page: control characters are pictures of themselves.

    An escape sequence in a completion could otherwise clear the screen, retitle the window or hide what follows.
    """
    return STEERING.sub(lambda match: _picture(match.group()), whole_characters(text))


def escaped(text: str) -> str:
    """The text with what steers a terminal spelt out, as `\\x1b`; halves of characters as well."""
    return _UNSHOWABLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def _picture(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"\\u{code:04x}"


def short(value: Any) -> str | None:
    """A number in at most six characters (seven below zero): 0.412, 12.3, 1234, 4e-05."""
    if not isinstance(value, int | float) or math.isnan(value):
        return None
    if value == 0 or 0.001 <= abs(value) < 10:
        return f"{value:.3f}"
    if abs(value) < 0.001 or abs(value) >= 100_000:
        return f"{value:.0e}"
    return f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def clock(seconds: float) -> str:
    """A time in at most six characters: 8s, 4m05s, 2h03m, 3d04h."""
    whole = round(seconds)
    for unit, name, part, part_name in ((86_400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= unit:
            return f"{whole // unit}{name}{whole % unit // part:02d}{part_name}"
    return f"{whole}s"
