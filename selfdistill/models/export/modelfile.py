"""An Ollama Modelfile whose template is the model's own.

Ollama has templates in Go's text/template, where a chat template is Jinja. A chat template's output for a conversation
is looked at: what it writes before and after a system's, a user's and an assistant's text, and before the answer. That
makes a Go template, and what it renders is compared with the chat template on conversations of several shapes. Where
they differ, the model's template cannot be said in these terms, and the Modelfile leaves it to Ollama, which reads the
chat template in the GGUF file.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from selfdistill.models.export import ExportError
from selfdistill.models.export.verify import TransformersModel, compared_prompts
from selfdistill.rollout import Message, Prompt

if TYPE_CHECKING:
    from selfdistill.models.export.workers import Program

# Texts that no template writes by itself, in the place of contents.
A, B, C, D = "Alpha1x", "Bravo2x", "Charlie3x", "Delta4x"


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around the texts of a conversation.

    What stands between two texts may be taken for the end of one turn or for the beginning of the next: it is divided
    such that turns of one role are alike wherever they stand.

    Attributes:
        head: what stands before the first turn.
        around: by role, what stands before and after a text; a role that the template refuses is missing.
        answer: what stands before the answer.
        default_system: the system's text where a conversation has none; None: nothing is written then.
    """

    head: str
    around: Mapping[str, tuple[str, str]]
    answer: str
    default_system: str | None = None

    def go_template(self) -> str:
        """The template as Go's text/template has it."""
        choices = [
            f'{{{{ {"else " if index else ""}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for index, (role, (before, after)) in enumerate(self.around.items())
        ]
        return f"{self.head}{{{{ range .Messages }}}}{''.join(choices)}{{{{ end }}}}{{{{ end }}}}{self.answer}"

    @property
    def texts(self) -> list[str]:
        """Everything that it writes by itself."""
        return [
            self.head,
            self.answer,
            self.default_system or "",
            *(text for pair in self.around.values() for text in pair),
        ]


def render_go(template: str, messages: Sequence[Message]) -> str:
    """What Go's text/template makes of a template of our own: text, `range .Messages`, `if eq .Role`, `.Content`.

    Raises:
        ValueError: another construct.
    """
    pieces = re.split(r"\{\{ (.*?) \}\}", template)
    if pieces[1] != "range .Messages":
        raise ValueError(f"{pieces[1]} is no construct of these templates")
    end = max(index for index in range(1, len(pieces), 2) if pieces[index] == "end")
    return pieces[0] + "".join(_turn(pieces[2:end], message) for message in messages) + "".join(pieces[end + 1 :])


def _turn(pieces: Sequence[str], message: Message) -> str:
    """One turn of the loop: texts stand at even places, what stood in braces between them at odd ones."""
    written, taken, over = [pieces[0]], True, False
    for action, text in zip(pieces[1::2], pieces[2::2], strict=True):
        if chosen := re.fullmatch(r'(?:else )?if eq \.Role "(\w+)"', action):
            taken = not over and message["role"] == chosen[1]
            over = over or taken
        elif action == "end":
            taken = True
        elif action == ".Content":
            written.append(str(message["content"]) if taken else "")
        else:
            raise ValueError(f"{action} is no construct of these templates")
        written.append(text if taken else "")
    return "".join(written)


def turns_of(trained: TransformersModel) -> Turns | None:
    """What the model's chat template writes around texts; None where it has none, or where that depends on more."""
    if not trained.tokenizer.chat_template:
        return None
    try:
        alone, asking = (_rendered(trained, [("user", A)], asking) for asking in (False, True))
        several = _rendered(trained, [("user", A), ("assistant", B), ("user", C)], False)
        first, after_user = _around(alone, A)
        _, after_first, after_answer, _ = _around(several, A, B, C)
    except (TemplateError, ValueError, TypeError):
        return None
    before_system: str | None
    after_system: str | None
    try:
        before_system, after_system, _ = _around(_rendered(trained, [("system", A), ("user", B)], False), A, B)
    except (TemplateError, ValueError, TypeError):  # it has no turn of the system
        before_system = after_system = None
    before_user = _common_end([first, after_answer, *([] if after_system is None else [after_system])])
    if not (asking.startswith(alone) and after_first.startswith(after_user)):
        return None
    head, default = first.removesuffix(before_user), None
    around = {"user": (before_user, after_user)}
    around["assistant"] = after_first.removeprefix(after_user), after_answer.removesuffix(before_user)
    if before_system is not None and after_system is not None:
        after_system = after_system.removesuffix(before_user)
        if not before_system.startswith(head):  # a system's text of its own, where none is given
            default = head.removeprefix(before_system).removesuffix(after_system)
            head = ""
        around = {"system": (before_system.removeprefix(head), after_system), **around}
    return Turns(head, around, asking.removeprefix(alone), default)


def _around(text: str, *contents: str) -> list[str]:
    """The pieces before, between and behind these contents. Raises ValueError where one is not there exactly once."""
    pieces = []
    for content in contents:
        piece, text = text.split(content)
        pieces.append(piece)
    return [*pieces, text]


def _common_end(texts: Sequence[str]) -> str:
    return os.path.commonprefix([text[::-1] for text in texts])[::-1]


def _rendered(trained: TransformersModel, turns: Sequence[tuple[str, str]], asking: bool) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return _text(trained, messages, asking)


def _text(trained: TransformersModel, messages: Sequence[Message], asking: bool = True) -> str:
    kwargs: dict[str, Any] = dict(trained.chat_template_kwargs)
    text = trained.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asking, **kwargs)
    return str(text)


def modelfile(trained: TransformersModel, model: str) -> tuple[str, list[str]]:
    """The Modelfile's text, and sentences about what it cannot say."""
    lines, notes = [f"FROM ./{model}"], []
    turns = turns_of(trained)
    if turns is not None:
        spelled = any(mark in text for text in turns.texts for mark in ("{{", "}}", '"""'))
        turns = None if spelled or not _renders_alike(trained, turns) else turns
    if turns is not None:
        # llama.cpp puts the beginning token before every prompt of a tokenizer that has one.
        template = turns.go_template().removeprefix(_begins_with(trained))
        lines.append(f'TEMPLATE """{template}"""')
        if turns.default_system is not None:
            lines.append(f'SYSTEM """{turns.default_system}"""')
        if "system" not in turns.around:
            notes.append("The chat template has no turn for a system's text, and neither has the Modelfile.")
    elif trained.tokenizer.chat_template:
        notes.append(
            "This chat template cannot be said in Ollama's language: the Modelfile has none, and Ollama goes by the "
            "template in the GGUF file. `llama-server --jinja` renders that one itself."
        )
    if trained.tokenizer.eos_token:
        lines.append(f'PARAMETER stop "{trained.tokenizer.eos_token}"')
    return "\n".join([*lines, ""]), notes


def _begins_with(trained: TransformersModel) -> str:
    """The text of the token that the tokenizer puts before every text; empty where it puts none."""
    ids = trained.tokenizer("x").input_ids
    first = ids[0] if ids else None
    return str(trained.tokenizer.bos_token) if first == trained.tokenizer.bos_token_id and first is not None else ""


def _renders_alike(trained: TransformersModel, turns: Turns) -> bool:
    """Whether the Go template renders conversations as the chat template does."""
    shapes = ["u", "uau", "uauau"] + (["su", "suau"] if "system" in turns.around else [])
    role = {"s": "system", "u": "user", "a": "assistant"}
    for shape in shapes:
        messages: list[Message] = [
            {"role": role[letter], "content": f"{text} says\n{{it}} & more"}
            for letter, text in zip(shape, (A, B, C, D, "Echo5x"), strict=False)
        ]
        try:
            expected = _text(trained, messages)
        except (TemplateError, ValueError, TypeError):
            return False
        if render_go(turns.go_template(), with_default(messages, turns.default_system)) != expected:
            return False
    return True


def with_default(messages: Sequence[Message], default_system: str | None) -> list[Message]:
    """The conversation as Ollama gives it to the template: with the Modelfile's SYSTEM, where it has no such turn."""
    if default_system is None or (messages and messages[0]["role"] == "system"):
        return list(messages)
    return [{"role": "system", "content": default_system}, *messages]


def read_modelfile(text: str) -> tuple[str | None, str | None]:
    """TEMPLATE and SYSTEM of a Modelfile; None where it has none."""
    found = dict(re.findall(r'^(TEMPLATE|SYSTEM) """(.*?)"""$', text, re.M | re.S))
    return found.get("TEMPLATE"), found.get("SYSTEM")


def compare_modelfile(
    trained: TransformersModel, written: "Program", file: Path, prompts: Sequence[Prompt]
) -> list[str]:
    """Compares the ids that Ollama would give llama.cpp with those that the model was trained with.

    Returns:
        A sentence about what was compared.

    Raises:
        ExportError: they differ.
    """
    template, system = read_modelfile(file.read_text(encoding="utf-8"))
    chats = [prompt for prompt in compared_prompts(trained, prompts) if not isinstance(prompt, str)]
    known = [chat for chat in chats if template and all(f'"{turn["role"]}"' in template for turn in chat)]
    if template is None or not known:
        return []
    for chat in known:
        text = render_go(template, with_default(chat, system))
        ids = written.ask("tokenize", text=text, add_bos=True, special=True)
        if ids != trained.encode(chat):
            raise ExportError(
                f"the Modelfile's template gives other tokens than the chat template, for example for {chat[-1]}"
            )
    return [f"The Modelfile's template gives llama.cpp the chat template's tokens, on {len(known)} prompts."]
