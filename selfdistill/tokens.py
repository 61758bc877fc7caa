"""From text to token ids: the one way for student, scorer, teacher, evaluation and demonstrations.

Only the chat template and the tokenizer itself write control tokens. Whatever data, feedback, peers or completions
spell like one, `<|im_end|>` in ordinary characters, stays text: a seam is put inside each such spelling before the
template is rendered, and the rendered text is tokenised piece by piece between the seams. Wherever the template puts
the text, trimmed or repeated, the seam is in it. Text without such a spelling has no seam and gets the ids that the
tokenizer gives it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from selfdistill.rollout import Message, Prompt
from selfdistill.text import REPLACEMENT, whole_characters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands inside a spelled control token. Unicode keeps this code point free of any character.
SEAM = "\ufdd0"
# A tokenizer may put a space before the beginning of a text. Behind a line break it puts none.
ANCHOR = "\n"
PROBE = "Which template?"
# Keys of a message whose values the template compares, and never writes as somebody's text.
STRUCTURAL_KEYS = ("role", "type")


@dataclass(frozen=True)
class ControlTokens:
    """The texts of the tokens that nobody but template and tokenizer may write.

    Attributes:
        texts: of two characters or more, since a shorter one has no place for a seam.
        lengths: how long they are.
        beginnings: finds their first characters; None where there are no texts.
    """

    texts: frozenset[str]
    lengths: tuple[int, ...]
    beginnings: re.Pattern[str] | None

    @classmethod
    def of(cls, texts: set[str]) -> "ControlTokens":
        texts = {text for text in texts if len(text) > 1}
        first = "".join(sorted({text[0] for text in texts}))
        pattern = re.compile(f"[{re.escape(first)}]") if first else None
        return cls(frozenset(texts), tuple(sorted({len(text) for text in texts})), pattern)

    def with_seams(self, text: str) -> str:
        """The text with a seam behind the first character of each control token that it spells."""
        text = whole_characters(text)
        found = self.beginnings.finditer(text) if self.beginnings else ()
        cuts = [match.end() for match in found if self._spelled(text, match.start())]
        if not cuts:
            return text
        cuts = [0, *cuts, len(text)]
        pieces = (text[begin:end] for begin, end in zip(cuts, cuts[1:], strict=False))
        return SEAM.join(piece.replace(SEAM, REPLACEMENT) for piece in pieces)

    def _spelled(self, text: str, start: int) -> bool:
        return any(text[start : start + length] in self.texts for length in self.lengths)


_control_tokens: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, ControlTokens]]" = WeakKeyDictionary()


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> ControlTokens:
    """The tokenizer's special tokens, and those added ones with which its chat template separates the turns.

    The latter are not always marked as special (DeepSeek's `<｜User｜>` is not). They are found by rendering turns that
    are past; thinking tags and the like, which models write themselves, do not stand there.
    """
    state = len(tokenizer), tokenizer.chat_template
    known = _control_tokens.get(tokenizer)
    if known is None or known[0] != state:
        known = _control_tokens[tokenizer] = state, ControlTokens.of(_control_texts(tokenizer))
    return known[1]


def _control_texts(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    added = list(tokenizer.added_tokens_decoder.values())
    special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
    past: list[Message] = [{"role": role, "content": PROBE} for role in ("user", "assistant", "user")]
    frame = _rendered_or_empty(tokenizer, past, {})
    return special | {str(token) for token in added if str(token) in frame}


def _rendered_or_empty(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], template_kwargs: Mapping[str, Any]
) -> str:
    """The rendered messages; empty without a template, and where it refuses them, which it may do by any exception."""
    if not tokenizer.chat_template:
        return ""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **template_kwargs))
    except Exception:
        return ""


def encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Ids of a text by itself: nothing is added, and nothing in it becomes a control token."""
    return encode_rendered(tokenizer, [control_tokens(tokenizer).with_seams(text)])[0]


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Ids of a prompt: messages through the chat template up to where the assistant speaks, a string as it is."""
    return encode_prompts(tokenizer, [prompt], template_kwargs)[0]


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Prompt], template_kwargs: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """`encode_prompt` of several prompts of one kind.

    Args:
        template_kwargs: what `apply_chat_template` takes beside the messages, such as {"enable_thinking": False}.
    """
    rendered = [render(tokenizer, prompt, template_kwargs) for prompt in prompts]
    return encode_rendered(tokenizer, rendered, add_special_tokens=bool(prompts) and isinstance(prompts[0], str))


def render(
    tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, template_kwargs: Mapping[str, Any] | None = None
) -> str:
    """The text that the model is given for this prompt, ready for its answer; with seams, for `encode_rendered`.

    Raises whatever the template raises.
    """
    tokens = control_tokens(tokenizer)
    if isinstance(prompt, str):
        return tokens.with_seams(prompt)
    messages = [_with_seams(message, tokens) for message in prompt]
    options = {"add_generation_prompt": True, **(template_kwargs or {})}
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _with_seams(value: Any, tokens: ControlTokens) -> Any:
    """Every text inside a message with its seams."""
    if isinstance(value, str):
        return tokens.with_seams(value)
    if isinstance(value, list):
        return [_with_seams(item, tokens) for item in value]
    if isinstance(value, dict):
        return {k: item if k in STRUCTURAL_KEYS else _with_seams(item, tokens) for k, item in value.items()}
    return value


def encode_rendered(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, add_special_tokens: bool = False
) -> list[list[int]]:
    """Ids of texts that may have seams.

    Args:
        add_special_tokens: whether the tokenizer adds what it puts around a plain text, such as BOS.
    """
    if not texts:
        return []
    whole = [text for text in texts if SEAM not in text]
    ids = iter(_ids(tokenizer, whole, add_special_tokens) if whole else [])
    return [next(ids) if SEAM not in text else _sewn(tokenizer, text, add_special_tokens) for text in texts]


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    return [list(row) for row in tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]]


def _sewn(tokenizer: "PreTrainedTokenizerBase", text: str, add_special_tokens: bool) -> list[int]:
    first, *rest = text.split(SEAM)
    (anchor, *pieces) = _ids(tokenizer, [ANCHOR, first, *(ANCHOR + piece for piece in rest)], False)
    ids = list(pieces[0])
    for piece, anchored in zip(rest, pieces[1:], strict=True):
        continues = anchored[: len(anchor)] == anchor
        ids += anchored[len(anchor) :] if continues else _ids(tokenizer, [piece], False)[0]
    if add_special_tokens:
        (bare,), (full,) = _ids(tokenizer, [PROBE], False), _ids(tokenizer, [PROBE], True)
        before = next((n for n in range(len(full)) if full[n : n + len(bare)] == bare), len(full))
        ids = [*full[:before], *ids, *full[before + len(bare) :]]
    return ids


def end_of_turn(tokenizer: "PreTrainedTokenizerBase", template_kwargs: Mapping[str, Any] | None = None) -> int | None:
    """The token with which the chat template ends an assistant's turn; None where it ends none, and without a template.

    That is the first added token behind what the assistant says: Gemma's `<end_of_turn>`, ChatML's `<|im_end|>`.
    """
    question: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    return first_added(tokenizer, _rendered_or_empty(tokenizer, question, template_kwargs or {}).rpartition(PROBE)[2])


def first_added(tokenizer: "PreTrainedTokenizerBase", text: str) -> int | None:
    """The first special or added token in a text; None where it has none."""
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    return next((i for i in _ids(tokenizer, [text], False)[0] if i in added), None) if text else None
