"""One row of a file becomes one row of the dataset: prompt, answer, golden_response, id, and its other columns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selfdistill.config.suggestions import nearest
from selfdistill.data.chat import cut
from selfdistill.rollout import Message, Prompt
from selfdistill.text import SURROGATE

MESSAGE = '{"role": "user", "content": "…"}'
ROLES = ("system", "developer", "user", "assistant", "tool")


class BadRow(Exception):
    """What is wrong with this row, as the end of a sentence that begins with its place."""


@dataclass(frozen=True)
class Fields:
    """The names of the fields in the file. A dot goes into nested objects; None: not looked for."""

    prompt: str | None = "prompt"
    text: str | None = "text"
    answer: str | None = "answer"
    demonstration: str | None = "golden_response"
    system: str | None = "system"
    messages: str | None = "messages"
    id: str | None = "id"


# Fields that rows may lack, and the dataset's columns that they fill.
OPTIONAL = {"answer": "answer", "demonstration": "golden_response", "id": "id"}


@dataclass(frozen=True)
class CheckedRow:
    """A row in the dataset's shape, and which of the OPTIONAL fields the file had for it."""

    line: int
    columns: dict[str, Any]
    present: frozenset[str]


@dataclass(frozen=True)
class RowReader:
    """Turns the rows of a file into the dataset's; raises BadRow.

    Attributes:
        tokenizer: cuts raw text; not needed without `prompt_tokens`.
        conversational: prompts are lists of messages, else strings.
        system: a system message that replaces the rows' own.
        prompt_tokens: the prompt is so many tokens from the beginning of the text; the rest goes to `continuation`.
    """

    fields: Fields
    tokenizer: Any
    conversational: bool
    system: str | None = None
    prompt_tokens: int | None = None

    def read(self, line: int, raw: Any) -> CheckedRow:
        if not isinstance(raw, dict):
            raise BadRow(f'a row must be an object such as {{"prompt": "…"}}, this is {_kind(raw)}')
        columns: dict[str, Any] = {}
        followed: list[str] = []
        used = {getattr(self.fields, name) for name in OPTIONAL}
        if self.prompt_tokens:
            field = self._raw_text_field(raw)
            text = self._text(raw, field)
            columns["prompt"], columns["continuation"] = cut(self.tokenizer, text, self.prompt_tokens)
            used.add(field)
        else:
            field = self._prompt_field(raw)
            columns["prompt"], followed = self._prompt(raw, field)
            used |= {field, self.fields.system}
        present = frozenset(name for name in OPTIONAL if _find(raw, getattr(self.fields, name))[0])
        columns["answer"] = self._answer(raw)
        columns["golden_response"] = self._demonstrations(raw) or followed
        columns["id"] = self._id(raw, line)
        others = {key: value for key, value in raw.items() if key not in used and key not in columns}
        if any("\0" in str(key) for key in others):
            raise BadRow("a field's name has a NUL character")
        columns.update(_whole(others))
        return CheckedRow(line, columns, present)

    def _raw_text_field(self, raw: dict[str, Any]) -> str:
        field = self.fields.text or ""
        if _find(raw, field)[0]:
            return field
        instead = f" (write data.text_field={self.fields.prompt})" if _find(raw, self.fields.prompt)[0] else ""
        others = _available(raw, {"text_field": field})
        raise BadRow(f"data.prompt_tokens cuts raw text, and there is no field '{field}'{instead}{others}")

    def _prompt_field(self, raw: dict[str, Any]) -> str:
        """The field that the prompt is made of: the first one that has a value, else the first one that is there."""
        names = ("prompt", "messages", "text")
        candidates = {f"{name}_field": field for name in names if (field := getattr(self.fields, name))}
        found = [field for field in candidates.values() if _find(raw, field)[0]]
        if not found:
            wanted = " or ".join(f"'{field}'" for field in candidates.values())
            raise BadRow(f"no field {wanted}{_available(raw, candidates)}")
        return next((field for field in found if _find(raw, field)[1] is not None), found[0])

    def _prompt(self, raw: dict[str, Any], field: str) -> tuple[Prompt, list[str]]:
        """The prompt, and the assistant's message that follows it in a conversation, if any."""
        value = _find(raw, field)[1]
        if field == self.fields.messages or (field == self.fields.prompt and isinstance(value, list)):
            return self._conversation(raw, field, value)
        text, system = self._text(raw, field), self._system(raw)
        if not self.conversational:
            return (f"{system}\n\n{text}" if system else text), []
        return [*_system_message(system), {"role": "user", "content": text}], []

    def _conversation(self, raw: dict[str, Any], field: str, value: Any) -> tuple[list[Message], list[str]]:
        if not self.conversational:
            raise BadRow(
                f"field '{field}' holds messages, which need a chat template: write data.chat_template=default"
            )
        if not isinstance(value, list):
            raise BadRow(f"field '{field}' must be a list of messages {MESSAGE}, this is {_kind(value)}")
        messages = [self._message(field, number, message) for number, message in enumerate(value, start=1)]
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        if last is None:
            raise BadRow(f"field '{field}' has no message with the role 'user'")
        prompt, rest = messages[: last + 1], messages[last + 1 :]
        system = self._system(raw)
        if system and (self.system or prompt[0]["role"] != "system"):
            prompt = [*_system_message(system), *(message for message in prompt if message["role"] != "system")]
        return prompt, [rest[0]["content"]] if rest and rest[0]["role"] == "assistant" else []

    def _message(self, field: str, number: int, message: Any) -> Message:
        place = f"field '{field}', message {number}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise BadRow(f"{place} must be {MESSAGE}, this is {_kind(message)}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise BadRow(f"{place}: the role {role!r} is not one of {', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise BadRow(f"{place}: the content must be text that is not empty, this is {_kind(content)}")
        _refuse_surrogates(field, content)
        return {"role": role, "content": content}

    def _text(self, raw: dict[str, Any], field: str | None) -> str:
        value = _find(raw, field)[1]
        if value is None or (isinstance(value, str) and not value.strip()):
            raise BadRow(f"field '{field}' is empty")
        if not isinstance(value, str):
            raise BadRow(f"field '{field}' must be text, this is {_kind(value)}")
        _refuse_surrogates(field, value)
        return value

    def _system(self, raw: dict[str, Any]) -> str | None:
        if self.system:
            return self.system
        value = _find(raw, self.fields.system)[1]
        if not (value is None or isinstance(value, str)):
            raise BadRow(f"field '{self.fields.system}' must be text or null, this is {_kind(value)}")
        _refuse_surrogates(self.fields.system, value or "")
        return value or None

    def _answer(self, raw: dict[str, Any]) -> str | None:
        value = _find(raw, self.fields.answer)[1]
        if value is None:
            return None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        return self._text(raw, self.fields.answer)

    def _demonstrations(self, raw: dict[str, Any]) -> list[str]:
        field = self.fields.demonstration
        value = _find(raw, field)[1]
        if value is None:
            return []
        values = value if isinstance(value, list) else [value]
        if wrong := [item for item in values if not isinstance(item, str)]:
            raise BadRow(f"field '{field}' must be a list of texts, [\"…\"], this has {_kind(wrong[0])}")
        if not values or not all(item.strip() for item in values):
            raise BadRow(f"field '{field}' is empty")
        for item in values:
            _refuse_surrogates(field, item)
        return values

    def _id(self, raw: dict[str, Any], line: int) -> str:
        field = self.fields.id
        present, value = _find(raw, field)
        if not present:
            return str(line)
        if value is None or value == "":
            raise BadRow(f"field '{field}' is empty")
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise BadRow(f"field '{field}' must be text or a whole number, this is {_kind(value)}")
        return str(_whole(value))


def _system_message(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


def _find(raw: Mapping[str, Any], field: str | None) -> tuple[bool, Any]:
    """Whether the row has the field, and its value. A name with dots that is not a key leads into nested objects."""
    if field is None:
        return False, None
    if field in raw:
        return True, raw[field]
    value: Any = raw
    for part in field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _available(raw: Mapping[str, Any], wanted: Mapping[str, str]) -> str:
    """The end of a message: the row's fields, and which one may be meant. `wanted`: configuration key → field."""
    names = [str(name) for name in raw]
    for key, field in wanted.items():
        if near := nearest(field, names):
            return f"; the row has {', '.join(names)}; did you mean {near}? Rename it, or write data.{key}={near}"
    key = next(iter(wanted), "prompt_field")
    return f"; the row has {', '.join(names) or 'no fields'}. Say which one it is with data.{key}=NAME"


def _refuse_surrogates(field: str | None, text: str) -> None:
    if wrong := SURROGATE.search(text):
        problem = f"half a character, \\u{ord(wrong.group()):04x}, which no tokenizer takes"
        raise BadRow(f"field '{field}' has {problem}. Write the whole character")


def _whole(value: Any) -> Any:
    """A value of a field that is only passed on, with U+FFFD in the place of half characters."""
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_whole(key): _whole(item) for key, item in value.items()}
    return [_whole(item) for item in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    """What kind of value this is in JSON's terms, and the beginning of it."""
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    text = repr(value[:60] if isinstance(value, str | list) else value)  # a cell may hold megabytes
    cut = len(text) > 60 or (isinstance(value, str | list) and len(value) > 60)
    return f"{names.get(type(value), type(value).__name__)}: {text[:60] + '…' if cut else text}"
