"""Prompts: how they are written, which chat template renders them, and how long they are once rendered."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfdistill import tokens
from selfdistill.config.suggestions import guess
from selfdistill.errors import UserError, first_line
from selfdistill.rollout import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM_TURNS = ("keep", "merge")
SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True)
class Prompts:
    """What prompts are made of and how long they may be; the settings are `load_data`'s.

    Raises:
        UserError: a setting is out of range, or two of them exclude each other.
    """

    system: str | None
    prompt_tokens: int | None
    max_prompt_tokens: int | None
    chat_template: str
    template_kwargs: Mapping[str, Any]
    system_turn: str = "keep"

    def __post_init__(self) -> None:
        if self.system_turn not in SYSTEM_TURNS:
            wanted = f"write {' or '.join(SYSTEM_TURNS)}{guess(self.system_turn, SYSTEM_TURNS)}"
            raise UserError(f"data.system_turn={self.system_turn}: {wanted}")
        check_positive(prompt_tokens=self.prompt_tokens, max_prompt_tokens=self.max_prompt_tokens)
        if self.prompt_tokens and self.max_prompt_tokens and self.prompt_tokens > self.max_prompt_tokens:
            raise UserError(
                f"data.prompt_tokens={self.prompt_tokens} is more than "
                f"data.max_prompt_tokens={self.max_prompt_tokens}. Raise the latter."
            )
        if self.prompt_tokens and self.system:
            raise UserError("data.system has no place in raw text: leave out data.system or data.prompt_tokens.")

    def prepare(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        """Set the template on the tokenizer; True when prompts are messages, False when they are plain strings.

        Raises:
            UserError: the tokenizer has no template, the file is absent, or the template cannot render one message.
        """
        if self.prompt_tokens and not tokenizer.is_fast:
            raise UserError(
                "data.prompt_tokens needs a fast tokenizer, which this model does not have. Cut the text beforehand."
            )
        if self.prompt_tokens or self.chat_template == "none":
            return False
        if self.chat_template != "default":
            tokenizer.chat_template = _read(self.chat_template)
        elif not tokenizer.chat_template:
            raise UserError(
                "data.chat_template=default: this model's tokenizer has no chat template. "
                "Write data.chat_template=none for raw text, or the path of a Jinja file."
            )
        try:
            rendered = self.render(tokenizer, [{"role": "user", "content": tokens.PROBE}])
        except Exception as error:  # a template raises anything, also by its own raise_exception()
            line = getattr(error, "lineno", None)
            place = f", line {line}" if line else ""
            raise UserError(
                f"data.chat_template={self.chat_template}{place}: the template fails on one user message: "
                f"{first_line(error)}"
            ) from None
        if tokens.PROBE not in rendered:
            raise UserError(
                f"data.chat_template={self.chat_template}: the template leaves out what the user says. "
                "Write message['content'] for each message in messages."
            )
        return True

    def arranged(self, prompt: Prompt) -> Prompt:
        """The prompt as it is asked: with `system_turn=merge`, its system text stands in the first user turn."""
        return merged_system(prompt) if self.system_turn == "merge" else prompt

    def way_out(self, tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> str:
        """What to set where the template refuses a prompt; empty where nothing of ours helps."""
        merged = merged_system(prompt)
        if merged == prompt:
            return ""
        try:
            self.render(tokenizer, merged)
        except Exception:  # a template raises anything
            return ""
        return "; data.system_turn=merge puts the system text in front of the first user turn, which it takes"

    def render(self, tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> str:
        """The text that the model is given for this prompt, ready for its answer, as `lengths` takes it."""
        return tokens.render(tokenizer, prompt, self.template_kwargs)


def merged_system(prompt: Prompt) -> Prompt:
    """Messages without system turns: their text stands before the first user turn's, with an empty line between."""
    if isinstance(prompt, str) or not any(message["role"] in SYSTEM_ROLES for message in prompt):
        return prompt
    system = [message["content"] for message in prompt if message["role"] in SYSTEM_ROLES]
    turns = [message for message in prompt if message["role"] not in SYSTEM_ROLES]
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "user"), None)
    if first is None:
        return prompt
    content = "\n\n".join([*system, turns[first]["content"]])
    return [*turns[:first], {**turns[first], "content": content}, *turns[first + 1 :]]


def check_positive(**counts: int | None) -> None:
    """Raises UserError for a count of the group `data` that is neither null nor at least 1."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"data.{name}={value} must be at least 1, or null for none.")


def _read(chat_template: str) -> str:
    if "{%" in chat_template or "{{" in chat_template:
        raise UserError("data.chat_template holds a template. Save it as a file and write data.chat_template=FILE.")
    path = Path(chat_template).expanduser()
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"data.chat_template={chat_template}: the file is not UTF-8 ({error}).") from None
    except OSError:
        names = ["default", "none", *(p.name for p in path.parent.glob("*") if p.is_file())]
        raise UserError(
            f"data.chat_template={chat_template}: there is no such file{guess(path.name, names)} "
            "Write default, none, or the path of a Jinja file."
        ) from None


def lengths(tokenizer: "PreTrainedTokenizerBase", texts: list[str], rendered: bool) -> list[int]:
    """Tokens of each prompt as the trainer will have them: special tokens are added to plain text only."""
    return [len(ids) for ids in tokens.encode_rendered(tokenizer, texts, add_special_tokens=not rendered)]


def cut(tokenizer: "PreTrainedTokenizerBase", text: str, max_tokens: int) -> tuple[str, str]:
    """The text of the first `max_tokens` tokens, and the rest; together they are the whole text."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(offsets) <= max_tokens:
        return text, ""
    end = offsets[max_tokens - 1][1]
    return text[:end], text[end:]
