"""Templates with named slots, and the cut of an over-long text to a number of tokens."""

import string
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from selfdistill.config.suggestions import guess
from selfdistill.errors import UserError
from selfdistill.rollout import Prompt
from selfdistill.text import whole_characters
from selfdistill.tokens import SEAM, control_tokens, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_PREFIX = "file:"
FILE_SUFFIXES = (".txt", ".md", ".jinja")
CUT_MARK = " …"
# With which a text is first shortened; English has about four.
CHARACTERS_PER_TOKEN = 16


class Template:
    """A text with slots in single braces, `{prompt}`; a literal brace is written twice, `{{` and `}}`.

    What is inserted is never read as a template again, so that braces in data are only braces.

    Args:
        source: the text itself, or the file that holds it: `file:PATH`, or a path that ends in .txt, .md or .jinja.
            One newline at the end of a file is dropped.
        key: the configuration key that the text comes from, named in errors.
        slots: the slots that `fill` will be given.
        required: the slots that must occur; all of `slots` where None.

    Raises:
        UserError: the file cannot be read, a brace stands alone, or a slot is unknown or missing.
    """

    def __init__(
        self, source: str, *, key: str, slots: Collection[str], required: Collection[str] | None = None
    ) -> None:
        self.text = _text_of(source, key)
        # Pairs of a literal and the slot after it; the last slot may be None.
        self._parts: list[tuple[str, str | None]] = []
        try:
            parsed = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise UserError(f"{key}: {error}; a literal brace is written twice: {{{{ or }}}}.") from None
        for literal, slot, specification, conversion in parsed:
            if slot is not None and (slot not in slots or specification or conversion):
                raise UserError(
                    f"{key}: {{{slot}}} is not a slot of this template, which has "
                    f"{_braced(slots)}{guess(f'{{{slot}}}', map('{{{}}}'.format, slots))} "
                    "Write a slot as it stands here, and a literal brace twice: {{ or }}."
                )
            self._parts.append((literal, slot))
        present = {slot for _, slot in self._parts}
        if missing := [slot for slot in (slots if required is None else required) if slot not in present]:
            hint = ""
            if not present - {None}:
                hint = f" If {source!r} is a file, write {FILE_PREFIX} in front of its path."
            raise UserError(
                f"{key}: the template lacks {_braced(missing)}; write each where its text is to stand.{hint}"
            )

    def fill(self, **values: str) -> str:
        """The text with every slot replaced by its value."""
        return "".join(literal + (values[slot] if slot else "") for literal, slot in self._parts)


def fill_last_user_turn(prompt: Prompt, template: Template, /, **values: str) -> Prompt:
    """`prompt` with the text of its last user turn put into the template's slot {prompt}, and `values` into the others.

    Raises:
        UserError: a conversation has no user turn.
    """
    if isinstance(prompt, str):
        return template.fill(prompt=prompt, **values)
    for i in reversed(range(len(prompt))):
        if prompt[i]["role"] == "user":
            turn = {**prompt[i], "content": template.fill(prompt=prompt[i]["content"], **values)}
            return [*prompt[:i], turn, *prompt[i + 1 :]]
    roles = ", ".join(message["role"] for message in prompt) or "none"
    raise UserError(f"a prompt has no user turn for the teacher's context to go into (its turns: {roles}).")


def _text_of(source: str, key: str) -> str:
    if source.startswith(FILE_PREFIX):
        path = Path(source.removeprefix(FILE_PREFIX)).expanduser()
    elif source.endswith(FILE_SUFFIXES) and not {"{", "\n"} & set(source):
        path = Path(source).expanduser()
    else:
        return source
    try:
        return path.read_text(encoding="utf-8-sig").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{key}: cannot read the template file {path.absolute()}: {reason}.") from None


def _braced(slots: Iterable[str]) -> str:
    return ", ".join(f"{{{slot}}}" for slot in slots)


def cut(text: str, max_tokens: int | None, tokenizer: "PreTrainedTokenizerBase") -> str:
    """`text`; where it has more than `max_tokens` tokens, its beginning and a visible mark, together within the budget.

    The cut falls between two tokens and never inside a character. A budget smaller than the mark leaves the bare mark.
    """
    text = whole_characters(text)
    if max_tokens is None:
        return text
    # Of a text of megabytes no more is tokenised than is surely too long: a tokenizer takes minutes for the whole.
    characters = CHARACTERS_PER_TOKEN * max_tokens
    while characters < len(text) and _count(text[:characters], tokenizer) <= 2 * max_tokens:
        characters *= 4
    text = text[:characters]
    if _count(text, tokenizer) <= max_tokens:
        return text
    starts = _token_starts(text, tokenizer)
    keep = min(max_tokens, len(starts) - 1)
    while keep > 0:
        shortened = text[: starts[keep]].rstrip() + CUT_MARK
        # Counted again because the tokens of a shortened text need not be a prefix of the text's own.
        excess = _count(shortened, tokenizer) - max_tokens
        if excess <= 0 and shortened != CUT_MARK:
            return shortened
        keep -= max(excess, 1)
    return CUT_MARK.strip()


def _count(text: str, tokenizer: "PreTrainedTokenizerBase") -> int:
    return len(encode(tokenizer, text))


def _token_starts(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The position in `text` at which each token begins; of tokens that share a character, that character's."""
    if tokenizer.is_fast:
        starts, before = [], 0
        for piece in control_tokens(tokenizer).with_seams(text).split(SEAM):
            found = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            starts += [before + start for start, _ in found["offset_mapping"]]
            before += len(piece)
        return starts
    # Without offsets: the lengths of the decoded beginnings, less a last character that is not complete yet.
    ids = encode(tokenizer, text)
    return [len(str(tokenizer.decode(ids[:end])).rstrip("\ufffd")) for end in range(len(ids))]
