"""From a path to the rows that a run trains and is evaluated on."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfdistill.config.suggestions import guess
from selfdistill.data import chat
from selfdistill.data.rows import Fields, RowReader
from selfdistill.data.sources import EXTENSIONS, FORMATS, open_source
from selfdistill.data.table import Table, TableReader
from selfdistill.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSplits:
    """What a run trains on, what it is evaluated on, and what was left out.

    Attributes:
        train: datasets.Dataset with the columns prompt (messages, or str), answer (str or None), golden_response
            (list[str]), id (str), and the file's other columns.
        eval: the same, of rows that share no prompt with `train` where both come from one file.
        bad_rows: one {"file", "line", "reason"} a skipped row; `line` is a row number where a format has no lines.
    """

    train: "Dataset"
    eval: "Dataset"
    bad_rows: list[dict[str, Any]] = field(default_factory=list)


def load_data(
    *,
    path: str,
    tokenizer: Any,
    format: str | None = None,
    split: str | None = None,
    subset: str | None = None,
    eval_path: str | None = None,
    eval_fraction: float = 0.1,
    max_train_rows: int | None = None,
    max_eval_rows: int | None = None,
    prompt_field: str | None = "prompt",
    text_field: str | None = "text",
    answer_field: str | None = "answer",
    demonstration_field: str | None = "golden_response",
    system_field: str | None = "system",
    messages_field: str | None = "messages",
    id_field: str | None = "id",
    require: Sequence[str] = (),
    system: str | None = None,
    prompt_tokens: int | None = None,
    max_prompt_tokens: int | None = 512,
    chat_template: str = "default",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    on_bad_row: str = "error",
    local_files_only: bool = False,
    seed: int = 0,
) -> DataSplits:
    """Read, check and split the data.

    A row's prompt comes from the first of these fields that it has: `prompt_field` (text, or messages),
    `messages_field` (the prompt ends with the last user turn; an assistant's message after it becomes the golden
    response), `text_field` (the whole text is what the user says). Without a chat template prompts are plain strings,
    and a system message stands before the prompt, separated by an empty line. The fields that were read are replaced by
    prompt, answer, golden_response and id, also where the file has other fields of these names; all others stay.
    An answer, golden response or id that some rows of a file have, all its rows must have, be it as null: a row without
    is taken for a typing error.

    Args:
        path: a file, `embedded:NAME` for data that comes with the package, or a hub dataset `owner/name[:split]`.
        tokenizer: the student's; a `chat_template` that is a path is set on it.
        format: jsonl, json, parquet, csv or hub; None goes by the extension.
        split, subset: of a hub dataset. Without a split `train` is taken.
        eval_path: where the evaluation rows are; None takes `eval_fraction` of the distinct prompts of `path`.
        max_train_rows, max_eval_rows: keep so many rows, a seeded choice; more rows include the fewer.
        require: `answer`, `golden_response`: the fields that every row must have.
        system: a system message for all rows, in place of their own.
        prompt_tokens: the prompt is the first so many tokens of the raw text, as a plain string; the rest stays in the
            column `continuation`.
        max_prompt_tokens: of the rendered prompt; None for no limit.
        chat_template: `default`, `none`, or the path of a Jinja file.
        chat_template_kwargs: what the template is rendered with, such as {"enable_thinking": False}; the trainer
            needs the same.
        on_bad_row: `error`, or `skip`: leave the row out and list it in `bad_rows`.
        local_files_only: never ask the hub; a hub dataset comes from the local cache.
        seed: of the split and of the choice of rows. Rows with identical prompts never land on both sides.

    Raises:
        UserError: an argument, a file or a row is wrong; the message has the place and what to write instead.
    """
    _check_arguments(
        path, format, eval_path, eval_fraction, max_train_rows, max_eval_rows, system, prompt_tokens, max_prompt_tokens,
        on_bad_row, require,
    )  # fmt: skip
    kwargs = dict(chat_template_kwargs or {})
    conversational = not prompt_tokens and chat.use_template(tokenizer, chat_template, kwargs)
    if prompt_tokens and not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "data.prompt_tokens needs a fast tokenizer, which this model does not have. Cut the text beforehand."
        )
    fields = Fields(prompt_field, text_field, answer_field, demonstration_field, system_field, messages_field, id_field)
    reader = RowReader(fields, tokenizer, conversational, system or None, prompt_tokens)
    limit = None if prompt_tokens else max_prompt_tokens
    table_reader = TableReader(reader, kwargs, limit, on_bad_row == "skip", _required(fields, require))
    where: dict[str, Any] = {"split": split, "subset": subset, "local_files_only": local_files_only}

    train = table_reader.read(open_source(path, key="data.path", format=format, **where))
    if eval_path:
        known = Path(eval_path).suffix.lower() in EXTENSIONS
        evaluation = table_reader.read(
            open_source(eval_path, key="data.eval_path", format=None if known else format, **where)
        )
        _warn_of_shared_prompts(train, evaluation)
    else:
        train, evaluation = _split(train, eval_fraction, seed)
    bad_rows = table_reader.bad_rows
    if bad_rows:
        log.warning("%d rows were skipped, the first: %s, %d: %s", len(bad_rows), *bad_rows[0].values())
    return DataSplits(
        _sample(train, max_train_rows, seed).dataset(), _sample(evaluation, max_eval_rows, seed).dataset(), bad_rows
    )


def _check_arguments(
    path: str,
    format: str | None,
    eval_path: str | None,
    eval_fraction: float,
    max_train_rows: int | None,
    max_eval_rows: int | None,
    system: str | None,
    prompt_tokens: int | None,
    max_prompt_tokens: int | None,
    on_bad_row: str,
    require: Sequence[str],
) -> None:
    """Raises UserError for what is wrong whatever the files hold."""
    if not path:
        raise UserError("data.path is empty: write the file to train on.")
    if format is not None and format not in FORMATS:
        raise UserError(f"data.format={format}: write one of {', '.join(FORMATS)}{guess(format, FORMATS)}")
    if not eval_path and not 0 < eval_fraction < 1:
        raise UserError(
            f"data.eval_fraction={eval_fraction} must lie between 0 and 1, both excluded: 0.1 keeps a tenth of the "
            "prompts for evaluation. Or give a file with data.eval_path."
        )
    counts = {
        "max_train_rows": max_train_rows, "max_eval_rows": max_eval_rows,
        "prompt_tokens": prompt_tokens, "max_prompt_tokens": max_prompt_tokens,
    }  # fmt: skip
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"data.{name}={value} must be at least 1, or null for none.")
    if prompt_tokens and max_prompt_tokens and prompt_tokens > max_prompt_tokens:
        raise UserError(
            f"data.prompt_tokens={prompt_tokens} is more than data.max_prompt_tokens={max_prompt_tokens}. "
            "Raise the latter."
        )
    if prompt_tokens and system:
        raise UserError("data.system has no place in raw text: leave out data.system or data.prompt_tokens.")
    if on_bad_row not in ("error", "skip"):
        raise UserError(f"data.on_bad_row={on_bad_row}: write error or skip.")
    for name in require:
        if name not in ("answer", "golden_response"):
            raise UserError(
                f"data.require={name}: write answer or golden_response{guess(name, ('answer', 'golden_response'))}"
            )


def _required(fields: Fields, require: Sequence[str]) -> frozenset[str]:
    """A field must be there when it is asked for, and when the user went to the trouble of naming it."""
    asked = {"answer": "answer", "golden_response": "demonstration"}
    named = {
        name for name in ("answer", "demonstration", "id") if getattr(fields, name) not in (None, getattr(Fields, name))
    }
    return frozenset(named | {asked[name] for name in require})


def _key(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def _rank(key: str, seed: int) -> bytes:
    """A random order that depends on the prompt and the seed alone, not on the other rows or their order."""
    return hashlib.blake2b(key.encode(), digest_size=16, salt=(seed % 2**64).to_bytes(8, "big")).digest()


def _split(table: Table, eval_fraction: float, seed: int) -> tuple[Table, Table]:
    """Both sides in the file's order; at least one distinct prompt for evaluation."""
    keys = [_key(row.columns["prompt"]) for row in table.rows]
    distinct = sorted(set(keys), key=lambda key: _rank(key, seed))
    count = max(1, round(eval_fraction * len(distinct)))
    if count >= len(distinct):
        sides = "evaluation would be empty" if len(distinct) == 1 else "training would be left with nothing"
        raise UserError(
            f"data.path={table.source.name} has {len(distinct)} distinct prompts: with "
            f"data.eval_fraction={eval_fraction} {sides}. Give more rows, another fraction, "
            "or a file of its own with data.eval_path."
        )
    held_out = set(distinct[:count])
    rows = list(zip(table.rows, keys, strict=True))
    return (
        Table(table.source, [row for row, key in rows if key not in held_out]),
        Table(table.source, [row for row, key in rows if key in held_out]),
    )


def _sample(table: Table, count: int | None, seed: int) -> Table:
    if count is None or count >= len(table.rows):
        return table
    # Another salt than the split's, which has sorted these prompts already.
    order = sorted(
        range(len(table.rows)), key=lambda i: _rank(f"{table.rows[i].line} {table.rows[i].columns['id']}", seed)
    )
    return Table(table.source, [table.rows[i] for i in sorted(order[:count])])


def _warn_of_shared_prompts(train: Table, evaluation: Table) -> None:
    lines = {_key(row.columns["prompt"]): row.line for row in train.rows}
    shared = [row for row in evaluation.rows if _key(row.columns["prompt"]) in lines]
    if shared:
        first = shared[0]
        log.warning(
            "%d of %d evaluation prompts are also trained on, so accuracy looks better than it is; first: %s and %s",
            len(shared), len(evaluation.rows), evaluation.source.place(first.line),
            train.source.place(lines[_key(first.columns["prompt"])]),
        )  # fmt: skip
