"""Values as plain data, which is all that the two processes give each other."""

import builtins
import json
import os

MOST_ITEMS, MOST_DEPTH = 200_000, 60
MOST_PRINTED = 100_000
MESSAGE_CHARACTERS = 600
# Libraries whose functions a test may use under the name by which the solution has imported them.
MEASURES = (
    "math", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "itertools", "operator",
    "re", "statistics",
)  # fmt: skip


class NotPlain(Exception):
    """A value that cannot be sent as data."""


def encode(value, keep, depth=0, budget=None):
    """The value as JSON. Subclasses lose their class; `keep` says what is sent for an object that is not plain data."""
    budget = budget or [MOST_ITEMS]
    budget[0] -= 1
    if depth > MOST_DEPTH or budget[0] < 0:
        raise NotPlain("it is too deep or too large")

    def each(values):
        return [encode(item, keep, depth + 1, budget) for item in values]

    kind = type(value)
    if value is None or kind is bool:
        return value
    if issubclass(kind, int):
        number = int.__index__(value)
        return number if abs(number) < 2**63 else {"int": hex(number)}
    if issubclass(kind, float):
        return float.__float__(value)
    if issubclass(kind, str):
        return str.__str__(value)
    if issubclass(kind, list | tuple | set | frozenset):
        base = next(base for base in (list, tuple, set, frozenset) if issubclass(kind, base))
        return {base.__name__: each(base.__iter__(value))}
    if issubclass(kind, dict):
        return {"dict": [each(pair) for pair in dict.items(value)]}
    if kind in (bytes, bytearray):
        return {kind.__name__: value.hex()}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is range:
        return {"range": [value.start, value.stop, value.step]}
    if kind is slice:
        return {"slice": each([value.start, value.stop, value.step])}
    module, name = kind.__module__, kind.__name__
    if module == "collections" and name == "deque":
        return {"deque": each(value)}
    if module == "fractions" and name == "Fraction":
        return {"Fraction": each([value.numerator, value.denominator])}
    if module == "decimal" and name == "Decimal":
        return {"Decimal": str(value)}
    if module == "datetime" and name in ("date", "datetime", "time"):
        return {name: value.isoformat()}
    if module == "datetime" and name == "timedelta":
        return {name: [value.days, value.seconds, value.microseconds]}
    if module == "numpy" and name == "ndarray" and value.dtype.kind in "biufcU":
        return {"ndarray": [value.dtype.str, encode(value.tolist(), keep, depth + 1, budget)]}
    if module == "numpy" and hasattr(value, "item") and hasattr(value, "dtype"):
        return encode(value.item(), keep, depth + 1, budget)
    return keep(value)


def decode(wire, found):
    """The value that `encode` was given; `found` gives the object for what was sent in place of one."""
    if not isinstance(wire, dict):
        return wire
    ((kind, content),) = wire.items()

    def each():
        return [decode(item, found) for item in content]

    if kind in ("list", "tuple", "set", "frozenset", "range", "slice", "complex"):
        make = getattr(builtins, kind)
        return make(*each()) if kind in ("range", "slice", "complex") else make(each())
    if kind == "dict":
        return {decode(key, found): decode(value, found) for key, value in content}
    if kind == "int":
        return int(content, 16)
    if kind in ("bytes", "bytearray"):
        return getattr(builtins, kind).fromhex(content)
    if kind == "deque":
        import collections

        return collections.deque(each())
    if kind == "Fraction":
        import fractions

        return fractions.Fraction(*each())
    if kind == "Decimal":
        import decimal

        return decimal.Decimal(content)
    if kind in ("date", "datetime", "time", "timedelta"):
        import datetime

        make = getattr(datetime, kind)
        return make(*content) if kind == "timedelta" else make.fromisoformat(content)
    if kind == "ndarray":
        import numpy

        dtype = numpy.dtype(content[0])
        if dtype.kind not in "biufcU":
            raise NotPlain("an array of objects")
        return numpy.array(decode(content[1], found), dtype=dtype)
    return found(kind, content)


def send(descriptor, message):
    data = json.dumps(message).encode()
    data = b"%08x" % len(data) + data
    while data:
        data = data[os.write(descriptor, data) :]


class Printed:
    """Stands for sys.stdout: keeps the beginning of what the code prints, for a test that captures it."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += str(text)[: MOST_PRINTED - len(self.text)]
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return False

    def taken(self):
        text, self.text = self.text, ""
        return text
