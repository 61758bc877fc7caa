"""Questions with lettered options."""

import re
from dataclasses import dataclass

from selfdistill.errors import UserError
from selfdistill.rewards.base import BadAnswer, Judge, Wrong

TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
# What may stand around a letter: brackets, emphasis, code, formulas and quotes.
OPENING, CLOSING = r"[\s(\[{*_`$\"']*", r"[)\]}*_`$\"']*"
BOXED = r"\\boxed\s*\{\s*(?:\\(?:text|mathrm|mathbf)\s*\{\s*)?\(?"
# What says that the letter behind it is the choice.
DECLARED = (
    r"(?:\b(?:answer|choice|option)"
    r"(?:\s+(?:is|would\s+be|should\s+be|must\s+be)(?:\s+(?:option|choice))?\s*:?|\s*[:=])"
    r"|(?<!not )(?<!n't )\b(?:choose|pick|select|go\s+with)(?:\s+(?:option|choice))?)"
)


@dataclass(eq=False)
class MultipleChoice(Judge):
    """Right is a completion that chooses the right letter.

    The choice is the letter in the last <answer>…</answer>, alone or before the text of its option ("B) 42 J"). Without
    such tags it is the letter in the last \\boxed{…}, else the last one that is declared ("the answer is B",
    "Answer: b", "I choose B"), else the last letter that stands by itself ("B", "(B)", "B."), so that letters inside
    words and chemical formulas don't count. An "A" before a word in small letters is an article, or the subject of a
    sentence.

    Args:
        answer_field, feedback: see `Judge`; the verdict also says what is wrong with the form.
        choices: the letters, one character each.
        require_tags: without the tags there is no choice.
    """

    choices: str = "ABCD"
    require_tags: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.choices) < 2 or not self.choices.isalnum():
            raise UserError(
                f"reward.choices is {self.choices!r}; write the letters without anything between, as in ABCD"
            )
        self.choices = self.choices.upper()

    def choice(self, text: str) -> tuple[str | None, str]:
        """The chosen letter, or None and what is wrong with the form."""
        form = f"<answer>X</answer>, where X is one of {', '.join(self.choices)}"
        if tagged := TAGGED.findall(text):
            inside = tagged[-1].strip()
            found = re.match(rf"(?:{BOXED})?{OPENING}({self._letter}){CLOSING}(?:\s*$|[.:)](?:\s|$)|\s*[)}}])", inside)
            if found and not self._hesitates(inside[found.end(1) :]):
                return found[1].upper(), ""
            return None, f"What stands between <answer> and </answer> is not a single letter. End with {form}."
        if self.require_tags:
            return None, f"The answer is not marked. End with {form}."
        for pattern in (
            rf"{BOXED}({self._letter})\s*[)}}]",
            # A small letter is a choice only where nothing but a mark follows: "a" is a word.
            rf"(?i:{DECLARED}){OPENING}(?:([{self.choices}])(?!\w)|((?i:[{self.choices}]))(?={CLOSING}\s*(?:[.,;:!?]|$)))",
            rf"(?:^|(?<=[\s*:])){OPENING}([{self.choices}])(?=[\s.,;:!?)\]*_`$\"']|$)(?!(?<=A)\s+(?!because|since)[a-z])",
        ):
            matches = list(re.finditer(pattern, text))
            letters = [m[m.lastindex or 1] for m in matches if not self._hesitates(text[m.end() :])]
            if letters:
                return letters[-1].upper(), ""
            if matches:
                break
        return None, f"No choice was found. End with {form}."

    @property
    def _letter(self) -> str:
        return f"(?i:[{self.choices}])"

    def _hesitates(self, following: str) -> bool:
        """Whether another letter is offered beside the one before this text."""
        return bool(re.match(rf"{CLOSING}\s*(?:or|and|/|,|&)\s*{OPENING}[{self.choices}](?!\w)", following))

    def judge(self, completion: str, answers: list[str]) -> Wrong | None:
        answer = answers[0].strip().strip("().").upper()
        if len(answer) != 1 or answer not in self.choices:
            raise BadAnswer(
                f"the answer is {answers[0]!r}, which is none of {', '.join(self.choices)}. "
                f"Correct the column {self.answer_field!r}, or set reward.choices"
            )
        chosen, problem = self.choice(completion)
        if chosen == answer:
            return None
        return Wrong(problem or f"Your choice {chosen} is wrong.", f"The correct choice is {answer}.")
