"""From a path to the rows that a run trains and is evaluated on."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfdistill.config.suggestions import guess
from selfdistill.data.chat import Prompts, check_positive
from selfdistill.data.rows import OPTIONAL, Fields, RowReader
from selfdistill.data.sources import EXTENSIONS, open_source
from selfdistill.data.split import Selection, warn_of_shared_prompts
from selfdistill.data.table import TableReader
from selfdistill.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

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
    tokenizer: "PreTrainedTokenizerBase",
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
    system_turn: str = "keep",
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
    Where some rows of a file have an answer, golden response or id, all must have one, or null: a row without it is
    taken for a typing error.

    Args:
        path: a file, `embedded:NAME` for data that comes with the package, or a hub dataset `owner/name[:split]`.
        tokenizer: the student's; a `chat_template` that is a path is set on it.
        format: jsonl, json, parquet, csv or hub; None goes by the extension. A JSON list and one JSON object a line
            are told apart by themselves, and parquet is recognised.
        split, subset: of a hub dataset. Without a split `train` is taken.
        eval_path: where the evaluation rows are, in any format; None takes `eval_fraction` of the distinct prompts of
            `path`.
        max_train_rows, max_eval_rows: keep so many rows, chosen by the seed; a larger choice includes the smaller ones.
        require: `answer`, `golden_response`: the fields that every row must have.
        system: a system message for all rows, in place of their own.
        prompt_tokens: so many tokens from the beginning of the raw text are the prompt, as a plain string; the rest
            stays in the column `continuation`.
        max_prompt_tokens: of the rendered prompt; None for no limit.
        chat_template: `default`, `none`, or the path of a Jinja file.
        chat_template_kwargs: what the template is rendered with, such as {"enable_thinking": False}; the trainer has to
            render with the same.
        system_turn: `keep`, or `merge`: the system text stands in the first user turn, for templates that refuse a
            system turn (Gemma's).
        on_bad_row: `error`, or `skip`: leave the row out and list it in `bad_rows`.
        local_files_only: never ask the hub; a hub dataset comes from the local cache.
        seed: of the split and of the choice of rows. Rows with identical prompts never land on both sides.

    Raises:
        UserError: an argument, a file or a row is wrong; the message has the place and what to write instead.
    """
    if not path:
        raise UserError("data.path is empty: write the file to train on.")
    kwargs = dict(chat_template_kwargs or {})
    prompts = Prompts(system, prompt_tokens, max_prompt_tokens, chat_template, kwargs, system_turn)
    selection = Selection(None if eval_path else eval_fraction, seed)
    check_positive(max_train_rows=max_train_rows, max_eval_rows=max_eval_rows)
    fields = Fields(prompt_field, text_field, answer_field, demonstration_field, system_field, messages_field, id_field)
    reader = RowReader(fields, tokenizer, prompts.prepare(tokenizer), system or None, prompt_tokens)
    tables = TableReader(reader, prompts, on_bad_row, _required(fields, require))
    opened = partial(open_source, split=split, subset=subset, local_files_only=local_files_only)

    train = tables.read(opened(path, key="data.path", format=format))
    if eval_path:
        # `format` describes `path`, and `eval_path` too unless that has a known extension.
        known = Path(eval_path).suffix.lower() in EXTENSIONS
        evaluation = tables.read(opened(eval_path, key="data.eval_path", format=None if known else format))
        warn_of_shared_prompts(train, evaluation)
    else:
        train, evaluation = selection.split(train)
    if tables.bad_rows:
        first = tables.bad_rows[0]
        log.warning("%d rows were skipped, the first: %s, %d: %s", len(tables.bad_rows), *first.values())
    train, evaluation = selection.sample(train, max_train_rows), selection.sample(evaluation, max_eval_rows)
    return DataSplits(train.dataset(), evaluation.dataset(), tables.bad_rows)


def _required(fields: Fields, require: Sequence[str]) -> frozenset[str]:
    """The fields that every row must have: those that are asked for, and those whose name the user has set."""
    names = {column: name for name, column in OPTIONAL.items() if name != "id"}
    for column in require:
        if column not in names:
            raise UserError(f"data.require={column}: write answer or golden_response{guess(column, names)}")
    named = {name for name in OPTIONAL if getattr(fields, name) not in (None, getattr(Fields, name))}
    return frozenset(named | {names[column] for column in require})
