"""Where the prompts of generated data come from: a file, or the model itself, which writes some about topics."""

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfdistill.data.rows import BadRow, Fields, RowReader
from selfdistill.data.sources import open_source
from selfdistill.errors import UserError
from selfdistill.rollout import Message
from selfdistill.teachers.server.client import all_of
from selfdistill.teachers.server.writing import Writer

TOPIC_TEMPLATE = """\
Write {count} different requests that people might put to an assistant, all about this topic: {topic}

Each request is complete in itself, one line long, and unlike the others. Write one request a line, numbered, and \
nothing else."""
KNOWN_BLOCK = "\n\nThese are there already; write others:\n{known}"
MOST_KNOWN = 20
FRUITLESS_ROUNDS = 3
NUMBERING = re.compile(r"^\s*(?:\d+\s*[.):]|[-*•])\s*")


@dataclass
class Candidate:
    """A prompt that may become a row.

    Attributes:
        messages: the conversation that is sent.
        columns: what a reward may need besides, such as `answer` and `golden_response`.
        responses: what was written and kept.
    """

    messages: list[Message]
    columns: dict[str, Any] = field(default_factory=dict)
    responses: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The last turn, for reports."""
        return self.messages[-1]["content"]

    @property
    def key(self) -> str:
        """The same for prompts that differ in case, spacing and punctuation alone."""
        return normal("\n".join(message["content"] for message in self.messages))

    def as_json(self) -> dict[str, Any]:
        """A row of a data file that gives these messages again, and the responses as golden ones."""
        roles = [message["role"] for message in self.messages]
        row: dict[str, Any] = {"prompt": self.text if roles in (["user"], ["system", "user"]) else self.messages}
        if roles == ["system", "user"]:
            row["system"] = self.messages[0]["content"]
        if self.columns.get("answer") is not None:
            row["answer"] = self.columns["answer"]
        return {**row, "golden_response": self.responses}


def normal(text: str) -> str:
    """Text without case, punctuation and differences of spacing. Text that is punctuation alone keeps it."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = re.sub(r"[^\w\s]", " ", folded).split()
    # Signs carry the meaning where the words alone are the same, as in 3 + 4 and 3 - 4.
    signs = "".join(re.findall(r"[+\-*/=<>%^|&~]", folded))
    return " ".join(words) + (f" {signs}" if signs else "") or folded


class PromptSource:
    """Prompts, each once; those that differ in form alone count as one.

    Attributes:
        rejected: what did not become a prompt, with reasons, for the report.
    """

    def __init__(self) -> None:
        self.rejected: list[dict[str, str]] = []
        self._left: list[Candidate] = []
        self._seen: set[str] = set()

    def _add(self, candidate: Candidate) -> bool:
        """Whether the prompt is a new one."""
        if candidate.key in self._seen:
            self.rejected.append({"reason": "duplicate prompt", "prompt": candidate.text})
            return False
        self._seen.add(candidate.key)
        self._left.append(candidate)
        return True

    def written_by(self, writer: Writer) -> None:
        """Gives the writer to a source that has its prompts written, once there is a server."""

    async def take(self, count: int) -> list[Candidate]:
        """The next prompts; none when there are no more."""
        taken, self._left = self._left[:count], self._left[count:]
        return taken


class FilePrompts(PromptSource):
    """The prompts of a data file.

    Raises:
        UserError: no such file, or no usable row in it.
    """

    def __init__(self, path: str, system: str | None) -> None:
        super().__init__()
        rows = _text_rows(path, system) if path.endswith(".txt") else _data_rows(path, system)
        for place, read in rows:
            if isinstance(read, Candidate):
                self._add(read)
            else:
                self.rejected.append({"reason": "row that cannot be read", "prompt": f"{place}: {read}"})
        if not self._left:
            first = f" {self.rejected[0]['prompt']}" if self.rejected else ""
            raise UserError(f"prompts={path}: there is no usable prompt in it.{first}")


def _system_messages(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


def _lines(key: str, path: str, advice: str = "") -> list[str]:
    """The lines of a text file without the space around them, empty ones included.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise UserError(f"{key}={path}: {error.strerror}.{advice}") from None
    except UnicodeDecodeError:
        raise UserError(f"{key}={path} is not UTF-8. Save it as UTF-8.") from None


# A row of a file: where it stands, and the prompt or the reason why there is none.
FileRow = tuple[str, Candidate | str]


def _text_rows(path: str, system: str | None) -> Iterator[FileRow]:
    for number, line in enumerate(_lines("prompts", path), start=1):
        if line:
            yield f"line {number}", Candidate([*_system_messages(system), {"role": "user", "content": line}])


def _data_rows(path: str, system: str | None) -> Iterator[FileRow]:
    source = open_source(path, key="prompts")
    reader = RowReader(Fields(), None, conversational=True, system=system)
    for record in source.records:
        read: Candidate | str
        try:
            columns = dict(reader.read(record.line, record.value).columns)
            read = Candidate(columns.pop("prompt"), columns)
        except BadRow as error:
            read = str(error)
        yield source.place(record.line), record.error or read


class TopicPrompts(PromptSource):
    """Prompts that the model writes about topics, round after round. Each round shows it what it has written already.

    Args:
        topics: a file with one topic a line, or a list of topics.
        template: how prompts are asked for, with {count} and {topic}; None for the default.
        per_request: prompts asked for at once, about each topic.
        system: a system message for every prompt.

    Raises:
        UserError: no topics, or a template without {count} or {topic}.
    """

    def __init__(self, topics: str | Sequence[str], template: str | None, per_request: int, system: str | None) -> None:
        super().__init__()
        self._template = template if template is not None else TOPIC_TEMPLATE
        for name in ("{count}", "{topic}"):
            if name not in self._template:
                raise UserError(f"topic_template lacks {name}; it is: {self._template!r}")
        self._per_request = per_request
        self._system = system
        self._known: dict[str, list[str]] = {topic: [] for topic in _read_topics(topics)}

    def written_by(self, writer: Writer) -> None:
        self._writer = writer

    async def take(self, count: int) -> list[Candidate]:
        """The next prompts, newly written if need be; none when several rounds brought nothing new."""
        fruitless = 0
        while len(self._left) < count and fruitless < FRUITLESS_ROUNDS:
            before = len(self._left)
            await self._round(fruitless)
            fruitless = 0 if len(self._left) > before else fruitless + 1
        return await super().take(count)

    async def _round(self, attempt: int) -> None:
        """Ask once about every topic. Each attempt asks for another number, so that the cache has no answer to it."""
        answers = await all_of(self._writer.write_one(self._request(topic, attempt)) for topic in self._known)
        for (topic, known), written in zip(self._known.items(), answers, strict=True):
            if not written.kept:
                self.rejected.append({"reason": "answer without prompts", "prompt": topic})
            for text in (prompt for answer in written.kept for prompt in read_prompts(answer)):
                if self._add(Candidate([*_system_messages(self._system), {"role": "user", "content": text}])):
                    known.append(text)

    def _request(self, topic: str, attempt: int) -> str:
        text = self._template.replace("{count}", str(self._per_request + attempt)).replace("{topic}", topic)
        known = self._known[topic][-MOST_KNOWN:]
        return text + KNOWN_BLOCK.format(known="\n".join(known)) if known else text


def _read_topics(topics: str | Sequence[str]) -> list[str]:
    if isinstance(topics, str):
        lines = _lines("topics", topics, " A list is written topics=[cooking,travel].")
    else:
        lines = [str(topic).strip() for topic in topics]
    found = list(dict.fromkeys(line for line in lines if line))
    if not found:
        raise UserError(f"topics={topics}: there are no topics in it.")
    return found


def read_prompts(answer: str) -> list[str]:
    """The prompts in an answer: the texts of a JSON list, or its lines without numbers and bullets."""
    body = re.sub(r"^```\w*\n|\n?```$", "", answer.strip())
    try:
        parsed = json.loads(body)
    except ValueError:
        parsed = None
    if isinstance(parsed, list) and all(isinstance(item, str) for item in parsed):
        return [item.strip() for item in parsed if item.strip()]
    lines = [line for line in body.splitlines() if line.strip()]
    numbered = [line for line in lines if NUMBERING.match(line)]
    # Where lines are numbered, the others are what a model says around its list.
    texts = [NUMBERING.sub("", line).strip().strip('"') for line in (numbered or lines)]
    return [text for text in texts if text]
