"""Tool calls, compared with the expected ones call by call and argument by argument."""

import json
import re
from dataclasses import dataclass
from typing import Any

from selfdistill.rewards.base import BadAnswer, Judge, Wrong, shorten

FORM = '[{"Action": "name", "Action_Input": "{\\"argument\\": \\"value\\"}"}]'
ACTION = re.compile(r"^\s*Action:[ \t]*(.+?)\s*$", re.MULTILINE)
ACTION_INPUT = re.compile(r"^\s*Action[ _]Input:\s*", re.MULTILINE)
FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)
# Where calls begin; brackets that stand in the prose before them are none.
CALLS = re.compile(r'(?:\[\s*)?\{\s*"Action')
# A policy that repeats itself writes a thousand brackets. No tool takes arguments that are nested so deeply.
MOST_LEVELS = 50


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict[str, Any]


class FormatError(Exception):
    """A text that holds no readable tool calls; the message says why, in words meant for its author."""


def parse_calls(text: str) -> list[Call]:
    """The tool calls in a text: a JSON list of {"Action", "Action_Input"}, or lines `Action:` and `Action Input:`.

    Raises FormatError.
    """
    fenced = FENCE.findall(text)
    body = (fenced[-1] if fenced else text).strip()
    lines = list(ACTION.finditer(body))
    if lines and not body.startswith(("[", "{")):
        return [_line_call(body, line, end) for line, end in zip(lines, [*lines[1:], None], strict=True)]
    found = CALLS.search(body) or re.search(r"[\[{]", body)
    if not found:
        raise FormatError(f"No tool call was found. Write {FORM}.")
    value = _decoded(body, "The tool calls are", start=found.start())
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise FormatError(f"No tool call was found. Write {FORM}.")
    return [_json_call(entry) for entry in entries]


def _decoded(text: str, what: str, *, start: int = 0, whole: bool = False) -> Any:
    """The JSON value that begins at a character; with `whole` nothing may follow. Raises FormatError."""
    try:
        return json.loads(text) if whole else json.JSONDecoder().raw_decode(text[start:])[0]
    except json.JSONDecodeError as error:
        raise FormatError(f"{what} not valid JSON: {error.msg} at character {start + error.pos}.") from None
    except (ValueError, RecursionError):  # a number of thousands of digits, or as many brackets
        raise FormatError(f"{what} not valid JSON that can be read.") from None


def _json_call(entry: Any) -> Call:
    if not isinstance(entry, dict) or not isinstance(entry.get("Action"), str):
        raise FormatError(f'A tool call has no "Action" with the name of a tool. Write {FORM}.')
    name, value = entry["Action"], entry.get("Action_Input", entry.get("Action Input"))
    return Call(name.strip(), _arguments(value, name))


def _line_call(body: str, line: re.Match[str], following: re.Match[str] | None) -> Call:
    rest = body[line.end() : following.start() if following else len(body)]
    found, name = ACTION_INPUT.search(rest), line.group(1)
    if not found:
        raise FormatError(f'"Action: {name}" is not followed by a line "Action Input:".')
    raw = rest[found.end() :].strip()
    if raw.startswith("{"):  # the model may go on writing after the object
        return Call(name, _arguments(raw, name, whole=False))
    return Call(name, _arguments(raw.split("\n")[0], name))


def _arguments(value: Any, name: str, *, whole: bool = True) -> dict[str, Any]:
    if isinstance(value, str):
        value = _decoded(value, f"The input of {name} is", whole=whole) if value.strip() else {}
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise FormatError(f"The input of {name} is not a JSON object with one entry per argument.")
    return value


def _canonical(value: Any, levels: int = MOST_LEVELS) -> Any:
    """A text (or a dictionary or list of texts) that is equal for equal arguments.

    5, 5.0, "5" and "5.0", true and "true" are the same argument; the order of keys and surrounding space don't matter.
    Raises FormatError where more levels are nested.
    """
    if levels == 0:
        raise FormatError(f"The arguments are nested in more than {MOST_LEVELS} levels.")
    if isinstance(value, dict):
        return {key: _canonical(item, levels - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item, levels - 1) for item in value]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = value.strip() if isinstance(value, str) else json.dumps(value)
    whole = re.fullmatch(r"(-?\d+)\.0+", text)
    return whole[1] if whole else text


def differences(given: list[Call], wanted: list[Call]) -> list[str]:
    """What has to change in `given`, one sentence each; empty where the calls agree in any order."""
    given, missing, problems = list(given), [], []
    for call in wanted:
        same = next((other for other in given if other.name == call.name and not _different(other, call)), None)
        if same is None:
            missing.append(call)
        else:
            given.remove(same)
    for call in missing:
        near = next((other for other in given if other.name == call.name), None)
        if near is None:
            problems.append(f"A call of {call.name} is missing.")
            continue
        given.remove(near)
        for key in _different(near, call):
            if key not in near.arguments:
                problems.append(f"{call.name}: the argument {key} is missing.")
            elif key not in call.arguments:
                problems.append(f"{call.name}: there should be no argument {key}.")
            else:
                problems.append(f"{call.name}: the argument {key} should not be {json.dumps(near.arguments[key])}.")
    names = {call.name for call in wanted}
    problems += [f"{call.name} should not be called{' again' if call.name in names else ''}." for call in given]
    return sorted(problems)


def _different(given: Call, wanted: Call) -> set[str]:
    """The names of the arguments in which two calls of one tool differ."""
    ours, theirs = ({key: _canonical(value) for key, value in call.arguments.items()} for call in (given, wanted))
    return {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}


@dataclass(eq=False)
class ToolCalls(Judge):
    """Right is a completion that makes exactly the expected calls, in any order.

    Args:
        answer_field: see `Judge`. A completion that matches any of the accepted alternatives is right; feedback
            compares with the nearest.
        feedback: see `Judge`; the verdict says what differs.
        feedback_characters: how long the feedback is at most.
    """

    answer_field: str = "golden_response"
    feedback_characters: int = 2000

    def judge(self, completion: str, answers: list[str]) -> Wrong | None:
        try:
            wanted = [parse_calls(answer) for answer in answers]
        except FormatError as error:
            raise BadAnswer(
                f"the column {self.answer_field!r} holds no tool calls ({error}). "
                f"Write {FORM}, or name another column with reward.answer_field"
            ) from None
        try:
            given = parse_calls(completion)
            problems = min((differences(given, calls) for calls in wanted), key=len)
        except FormatError as error:
            problems = [str(error)]
        return Wrong(" ".join(problems), f"The expected calls are {answers[0]}") if problems else None

    def _text(self, wrong: Wrong) -> str:
        return shorten(super()._text(wrong), self.feedback_characters)
