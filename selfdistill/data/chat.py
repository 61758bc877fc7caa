"""Chat templates: which one is used, whether it works, and how long a prompt is once rendered."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfdistill.config.suggestions import guess
from selfdistill.errors import UserError

PROBE = "Which template?"


def use_template(tokenizer: Any, chat_template: str, kwargs: Mapping[str, Any]) -> bool:
    """Prepare the tokenizer: True when prompts are messages, False when they are plain strings.

    Args:
        tokenizer: its `chat_template` is replaced when `chat_template` is a path.
        chat_template: `default` (the tokenizer's own), `none`, or the path of a Jinja file.
        kwargs: what the template is rendered with besides the messages, such as `enable_thinking`.

    Raises:
        UserError: the tokenizer has no template, the file is absent, or the template cannot render one message.
    """
    if chat_template == "none":
        return False
    if chat_template == "default":
        if not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "data.chat_template=default: this model's tokenizer has no chat template. "
                "Write data.chat_template=none for raw text, or the path of a Jinja file."
            )
    else:
        tokenizer.chat_template = _read(chat_template)
    try:
        rendered = render(tokenizer, [{"role": "user", "content": PROBE}], kwargs)
    except Exception as error:  # a template raises anything, also by its own raise_exception()
        line = getattr(error, "lineno", None)
        place = f", line {line}" if line else ""
        raise UserError(
            f"data.chat_template={chat_template}{place}: the template fails on one user message: {error}"
        ) from None
    if PROBE not in rendered:
        raise UserError(
            f"data.chat_template={chat_template}: the template leaves out what the user says. Write message['content'] "
            "for each message in messages."
        )
    return True


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


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]], kwargs: Mapping[str, Any]) -> str:
    """The text that the model is given for these messages, ready for its answer."""
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **kwargs)


def lengths(tokenizer: Any, texts: list[str], rendered: bool) -> list[int]:
    """Tokens of each prompt as the trainer will have them: special tokens are added to plain text only."""
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=not rendered, verbose=False)["input_ids"]]


def cut(tokenizer: Any, text: str, tokens: int) -> tuple[str, str]:
    """The text of the first `tokens` tokens, and the rest; together they are the whole text."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(offsets) <= tokens:
        return text, ""
    end = offsets[tokens - 1][1]
    return text[:end], text[end:]
