"""Whether student and teacher speak the same language: how they are asked, and with which tokens they end.

A teacher that ends its answers with another token than the student gives the student's end next to no probability, so
that the student learns not to end: lengths explode and numbers fall. Another chat template or thinking mode does the
same to the first tokens. Both are looked for before the training, where they are a sentence and not a lost run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from selfdistill.errors import UserError
from selfdistill.rollout import Message
from selfdistill.tokens import PROBE, encode_prompt, end_of_turn, first_added

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION: list[Message] = [{"role": "user", "content": PROBE}]
ANSWERED: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Speaker:
    """A model as far as it is asked and ends.

    Attributes:
        tokenizer: its own, or the student's where it has the same.
        declared_ends: `eos_token_id` of its generation configuration.
        template_kwargs: what its chat template is rendered with.
        conversational: whether prompts are messages; plain text goes through no template.
    """

    tokenizer: "PreTrainedTokenizerBase"
    declared_ends: int | Sequence[int] | None
    template_kwargs: Mapping[str, Any]
    conversational: bool = True

    @property
    def ends(self) -> list[int]:
        """Every token at which it stops, or with which its template ends an assistant's turn."""
        turn = self.end_of_turn
        return list(dict.fromkeys([*self.plain_ends, *([] if turn is None else [turn])]))

    @property
    def plain_ends(self) -> list[int]:
        """Those that tokenizer and generation configuration name."""
        own = self.tokenizer.eos_token_id
        return list(dict.fromkeys([*([] if own is None else [own]), *as_list(self.declared_ends)]))

    @property
    def end_of_turn(self) -> int | None:
        """With which its template ends an assistant's turn; None where it ends none, and for plain text."""
        return end_of_turn(self.tokenizer, self.template_kwargs) if self.conversational else None

    @property
    def asked(self) -> list[int]:
        """A question as it gets it, up to where it answers."""
        return encode_prompt(self.tokenizer, QUESTION, self.template_kwargs)

    def turn_in(self, answered: Sequence[int]) -> int | None:
        """With which the ids of ANSWERED, as somebody's template writes them, end the assistant's turn."""
        return first_added(self.tokenizer, str(self.tokenizer.decode(list(answered))).rpartition(PROBE)[2])

    def show(self, ids: Sequence[int]) -> str:
        return repr(str(self.tokenizer.decode(list(ids)))[-SHOWN_CHARACTERS:])

    def names(self, ids: Sequence[int]) -> str:
        return " and ".join(repr(str(self.tokenizer.decode([i]))) for i in ids) or "none"


def as_list(declared: int | Sequence[int] | None) -> list[int]:
    """What a generation configuration may say of its ends: none, one or several."""
    if declared is None:
        return []
    return [declared] if isinstance(declared, int) else list(declared)


def own_findings(student: Speaker) -> list[str]:
    """What is odd about the student by itself, each with what to set."""
    found = []
    if not student.ends:
        found.append(
            "the student has no token that ends an answer: neither tokenizer nor generation configuration nor chat "
            "template name one, so that every completion runs to rollout.max_completion_tokens. Set eos_token in the "
            "model's tokenizer_config.json."
        )
    turn = student.end_of_turn
    if turn is not None and turn not in student.plain_ends:
        found.append(
            f"the chat template ends an answer with {student.names([turn])}, and the model's generation configuration "
            f"stops at {student.names(student.plain_ends)} alone: completions stop at both, and demonstrations end "
            "with the former. Set eos_token_id in the model's generation_config.json, so that others stop there too."
        )
    return found + unread_kwargs(student, "model.chat_template_kwargs")


def unread_kwargs(speaker: Speaker, key: str) -> list[str]:
    """One finding for each argument of the template that changes nothing in a prompt, such as a misspelt one."""
    if not speaker.conversational:
        return []
    kwargs = dict(speaker.template_kwargs)
    found = []
    for name in kwargs:
        without = {other: value for other, value in kwargs.items() if other != name}
        toggled = {**kwargs, name: not kwargs[name]} if isinstance(kwargs[name], bool) else without
        asked = [encode_prompt(speaker.tokenizer, QUESTION, chosen) for chosen in (kwargs, without, toggled)]
        if asked[0] == asked[1] == asked[2]:
            found.append(
                f"{key}.{name} changes nothing: the chat template does not read it. Look for its name in the template "
                "(enable_thinking, thinking, reasoning_effort …), or leave it out."
            )
    return found


def asked_alike(student: Speaker, teacher_asked: Sequence[int], instead: str) -> list[str]:
    """A finding where the teacher's question is not the student's, apart from what the context adds to it.

    Args:
        teacher_asked: the ids of the same question as the teacher gets it, or as its own template writes it.
        instead: what to set.
    """
    ours, theirs = student.asked, list(teacher_asked)
    if not student.conversational or ours == theirs:
        return []
    start = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return [
        f"the student's question differs from the teacher's from token {start} on: the student's ends with "
        f"{student.show(ours[start:])}, the teacher's with {student.show(theirs[start:])}. {instead}"
    ]


def ends_alike(student: Speaker, ends: Sequence[int], turn: int | None, teacher: str) -> list[str]:
    """A finding where student and teacher end with different tokens.

    Args:
        ends: the tokens at which the teacher stops.
        turn: with which its own template ends a turn; None where that isn't known.
        teacher: the configuration key that names it.

    Raises:
        UserError: they have no end in common, so that the teacher would teach the student never to end.
    """
    ours = student.ends
    if not ours or not ends:
        return []
    instead = (
        "Give both the same end: data.chat_template=FILE with the teacher's chat template, or eos_token_id in the "
        "generation_config.json of the one that lacks it."
    )
    if not set(ours) & set(ends):
        raise UserError(
            f"{teacher}: the student ends its answers with {student.names(ours)}, the teacher with "
            f"{student.names(ends)}. The teacher would give the student's end no probability, and completions would "
            f"grow to the limit. {instead}"
        )
    own_turn = student.end_of_turn
    if turn is not None and own_turn is not None and own_turn != turn:
        return [
            f"the student's chat template ends an answer with {student.names([own_turn])}, the teacher's with "
            f"{student.names([turn])}: watch distill/divergence_last and the length of completions. {instead}"
        ]
    return []


def compare_models(
    student: Speaker, tokenizer: "PreTrainedTokenizerBase | None", declared: int | Sequence[int] | None, teacher: str
) -> list[str]:
    """How another local model is asked and ends otherwise than the student, as far as its files tell.

    Args:
        tokenizer: the teacher's own; None where only its model is at hand.
        declared: `eos_token_id` of its generation configuration.
        teacher: the configuration key that names it.

    Raises:
        UserError: the two have no end in common.
    """
    if tokenizer is None:
        return ends_alike(student, as_list(declared), None, teacher)
    own = replace(student, tokenizer=tokenizer, declared_ends=declared)
    found = ends_alike(student, own.ends, own.end_of_turn, teacher)
    if not tokenizer.chat_template:
        return found
    instead = (
        f"{teacher} is asked in the student's chat template and was trained with its own: write "
        "data.chat_template=FILE with the teacher's, for both, if the answers should follow it."
    )
    return [*asked_alike(student, own.asked, instead), *found]


def files_of(
    name: str, *, revision: str | None = None, local_files_only: bool = False
) -> tuple["PreTrainedTokenizerBase", int | list[int] | None]:
    """A model's tokenizer and the `eos_token_id` of its generation configuration, without its weights.

    Raises:
        OSError, ValueError: they cannot be had.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from selfdistill.models.loading import resolve

    where: Any = {"revision": revision, "local_files_only": local_files_only}
    path = resolve(name)
    tokenizer = AutoTokenizer.from_pretrained(path, **where)
    try:
        settings = GenerationConfig.from_pretrained(path, **where)
    except OSError:  # a model without one gets it from its configuration
        settings = GenerationConfig.from_model_config(AutoConfig.from_pretrained(path, **where))
    return tokenizer, settings.eos_token_id
