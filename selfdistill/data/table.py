"""The rows of one file or hub dataset: read, checked together, and made into a dataset."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from selfdistill.config.suggestions import guess
from selfdistill.data.chat import Prompts, lengths
from selfdistill.data.rows import OPTIONAL, BadRow, CheckedRow, RowReader
from selfdistill.data.sources import RowSource
from selfdistill.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

BATCH_ROWS = 512
TYPED_COLUMNS = ("prompt", "answer", "golden_response", "id")
# Names under which rewards receive other things than the dataset's columns.
RESERVED = frozenset(
    "prompts completions prompt_ids policy_logprobs trainer_state log_extra log_metric environments".split()
)
SKIP_HINT = "(data.on_bad_row=skip leaves such rows out.)"


def _sentence(reason: str) -> str:
    return reason if reason.endswith(("?", ".")) else f"{reason}."


@dataclass(frozen=True)
class Table:
    """Accepted rows of one source."""

    source: RowSource
    rows: list[CheckedRow]

    def dataset(self) -> "Dataset":
        """The rows as a datasets.Dataset, with the four columns of fixed types first."""
        import pyarrow as pa
        from datasets import Dataset

        message = pa.struct([("role", pa.string()), ("content", pa.string())])
        types = {"answer": pa.string(), "golden_response": pa.list_(pa.string()), "id": pa.string()}
        types["prompt"] = pa.string() if isinstance(self.rows[0].columns["prompt"], str) else pa.list_(message)
        names = dict.fromkeys([*TYPED_COLUMNS, *(name for row in self.rows for name in row.columns)])
        columns = {}
        for name in names:
            values = [row.columns.get(name) for row in self.rows]
            try:
                columns[name] = pa.array(values, type=types.get(name))
            except (pa.ArrowException, OverflowError, TypeError) as error:
                raise UserError(self._mixed(name, values, error)) from None
        return Dataset.from_dict(columns)

    def _mixed(self, name: str, values: list[Any], error: Exception) -> str:
        kinds: dict[type, int] = {}
        for row, value in zip(self.rows, values, strict=True):
            if value is not None:
                kinds.setdefault(type(value), row.line)
        listed = ", ".join(f"{kind.__name__} ({self.source.unit} {line})" for kind, line in kinds.items())
        first = min(kinds.values(), default=self.rows[0].line)
        return (
            f"{self.source.place(first)}: the field '{name}' does not hold one kind of value in all rows: {listed} "
            f"[{str(error).splitlines()[0]}]. Write it in one kind, or take the field out."
        )


@dataclass
class TableReader:
    """Reads sources row by row; skips and lists bad rows, or raises at the first.

    Attributes:
        prompts: renders the prompts, to measure them, and sets their limit.
        on_bad_row: `error` or `skip`.
        required: the OPTIONAL fields that every row must have.
        bad_rows: of all sources so far, one {"file", "line", "reason"} each.
    """

    reader: RowReader
    prompts: Prompts
    on_bad_row: str
    required: frozenset[str]
    bad_rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.on_bad_row not in ("error", "skip"):
            raise UserError(f"data.on_bad_row={self.on_bad_row}: write error or skip.")

    def read(self, source: RowSource) -> Table:
        before = len(self.bad_rows)
        seen: dict[str, int] = {}
        rows: list[CheckedRow] = []
        batch: list[CheckedRow] = []
        for record in source.records:
            try:
                if record.error is not None:
                    raise BadRow(record.error)
                row = self.reader.read(record.line, record.value)
                row.columns["prompt"] = self.prompts.arranged(row.columns["prompt"])
                name = row.columns["id"]
                if "id" in row.present and (first := seen.setdefault(name, row.line)) != row.line:
                    raise BadRow(f"the id '{name}' is already that of {source.unit} {first}; ids must differ")
            except BadRow as error:
                self._refuse(source, record.line, str(error))
                continue
            if clash := RESERVED & row.columns.keys():
                raise UserError(
                    f"{source.place(record.line)}: the field '{min(clash)}' has a name that rewards "
                    "receive from the trainer. Rename it."
                )
            batch.append(row)
            if len(batch) == BATCH_ROWS:
                rows += self._short_enough(batch, source)
                batch = []
        rows = self._complete(rows + self._short_enough(batch, source), source)
        bad = self.bad_rows[before:]
        if not rows and not bad:
            raise UserError(f"{source.name} is empty: it has no rows.")
        if not rows:
            raise UserError(
                f"{source.name}: all {len(bad)} rows are bad, so nothing is left. "
                f"The first: {source.unit} {bad[0]['line']}: {_sentence(bad[0]['reason'])}"
            )
        return Table(source, rows)

    def _refuse(self, source: RowSource, line: int, reason: str) -> None:
        if self.on_bad_row == "error":
            raise UserError(f"{source.place(line)}: {_sentence(reason)} {SKIP_HINT}")
        self.bad_rows.append({"file": source.name, "line": line, "reason": reason})

    def _short_enough(self, rows: list[CheckedRow], source: RowSource) -> list[CheckedRow]:
        """The rows whose prompts are within the limit. Raw text is cut, and so is never too long."""
        limit = self.prompts.max_prompt_tokens
        if limit is None or self.prompts.prompt_tokens:
            return rows
        tokenizer = self.reader.tokenizer
        kept, texts, short = [], [], []
        for row in rows:
            try:
                texts.append(self.prompts.render(tokenizer, row.columns["prompt"]))
                kept.append(row)
            except Exception as error:  # templates refuse roles or orders of turns by raising what they like
                way_out = self.prompts.way_out(tokenizer, row.columns["prompt"])
                self._refuse(source, row.line, f"the chat template refuses these messages: {error}{way_out}")
        for row, tokens in zip(kept, lengths(tokenizer, texts, self.reader.conversational), strict=True):
            if tokens <= limit:
                short.append(row)
            else:
                over = f"{tokens} tokens, more than data.max_prompt_tokens={limit}"
                self._refuse(source, row.line, f"the prompt has {over}; raise that or shorten the prompt")
        return short

    def _complete(self, rows: list[CheckedRow], source: RowSource) -> list[CheckedRow]:
        """The rows without those that lack a field which is required, or which other rows of the file have."""
        for name in OPTIONAL:
            if name in self.required or any(name in row.present for row in rows):
                candidates, rows = rows, []
                for row in candidates:
                    if problem := self._missing(row, name):
                        self._refuse(source, row.line, problem)
                    else:
                        rows.append(row)
        return rows

    def _missing(self, row: CheckedRow, name: str) -> str | None:
        """What is wrong with a row without a value for a field; None where it has one, or may do without."""
        field_name, required, written = getattr(self.reader.fields, name), name in self.required, name in row.present
        # An id that is not written is the row's line; a demonstration may also follow the prompt in a conversation.
        has_value = bool(row.columns[OPTIONAL[name]]) and (written or name == "demonstration")
        if has_value or (written and not required):  # null, where it is written, says that there is none
            return None
        if written:
            return f"field '{field_name}' is empty, and every row must have it"
        names = [column for column in row.columns if column not in TYPED_COLUMNS]
        others = f"; its other fields: {', '.join(names)}{guess(field_name, names)}" if names else ""
        why = "every row must have it" if required else "other rows have it (where there is none, write null)"
        return f"no field '{field_name}', and {why}{others}"
