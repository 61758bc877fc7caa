"""Questions whose answer is a number."""

import math
import re
from dataclasses import dataclass

from selfdistill.rewards.base import BadAnswer, Judge, Wrong

# A minus behind a digit, letter or bracket subtracts; elsewhere it is a sign. Commas count between groups of three.
SIGN = r"(?:(?<![\w.)\]])-)?"
NUMBER = SIGN + r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][+-]?\d+)?"
# One number, or a fraction of two; a date such as 1/2/2024 is none.
FRACTION = rf"(?<![\d/])({NUMBER})\s*/\s*({NUMBER})(?!\s*/|\d)"
VALUE = re.compile(rf"{SIGN}\\[dt]?frac\{{({NUMBER})\}}\{{({NUMBER})\}}|{FRACTION}|({NUMBER})")


def last_number(text: str) -> float | None:
    """The last number in a text, or None: 1,234.5 and −3 and 2e5 and 3/4 are one number each, in 5-3 the last is 3."""
    found = list(VALUE.finditer(text.replace("−", "-")))
    if not found:
        return None
    parts = [float(part.replace(",", "")) for part in found[-1].groups() if part is not None]
    if len(parts) == 1:
        return parts[0]
    sign = -1 if found[-1][0].startswith("-\\") else 1
    return sign * parts[0] / parts[1] if parts[1] else parts[1]


@dataclass(eq=False)
class Arithmetic(Judge):
    """Right is a completion whose last number is the answer; of an answer that is a text, too, the last number counts.

    Args:
        answer_field, feedback: see `Judge`.
        tolerance: relative difference up to which two numbers are equal.
    """

    tolerance: float = 1e-9

    def judge(self, completion: str, answers: list[str]) -> Wrong | None:
        wanted, given = last_number(answers[0]), last_number(completion)
        if wanted is None:
            raise BadAnswer(
                f"the answer {answers[0]!r} holds no number. "
                f"Correct the column {self.answer_field!r}, or name another one with reward.answer_field"
            )
        if given is not None and math.isclose(given, wanted, rel_tol=self.tolerance):
            return None
        verdict = "Your answer holds no number." if given is None else f"Your result {given:.12g} is wrong."
        return Wrong(verdict, f"The correct result is {wanted:.12g}.")
