"""Rows of one source, read and checked as a whole, and as a dataset."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from selfdistill.config.suggestions import guess
from selfdistill.data import chat
from selfdistill.data.rows import BadRow, Row, RowReader
from selfdistill.data.sources import Source
from selfdistill.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

BATCH_ROWS = 512
TYPED_COLUMNS = ("prompt", "answer", "golden_response", "id")
# Names under which rewards receive other things than the dataset's columns.
RESERVED = frozenset(
    (
        "prompts",
        "completions",
        "prompt_ids",
        "policy_logprobs",
        "trainer_state",
        "log_extra",
        "log_metric",
        "environments",
    )
)
SKIP_HINT = "(data.on_bad_row=skip leaves such rows out.)"


def _sentence(reason: str) -> str:
    return reason if reason.endswith(("?", ".")) else f"{reason}."


@dataclass(frozen=True)
class Table:
    """Accepted rows of one source."""

    source: Source
    rows: list[Row]

    def dataset(self) -> "Dataset":
        """The rows as a datasets.Dataset, with the four columns of fixed types first."""
        import pyarrow as pa
        from datasets import Dataset

        message = pa.struct([("role", pa.string()), ("content", pa.string())])
        types = {"answer": pa.string(), "golden_response": pa.list_(pa.string()), "id": pa.string()}
        types["prompt"] = pa.string() if isinstance(self.rows[0].columns["prompt"], str) else pa.list_(message)
        names = dict.fromkeys(TYPED_COLUMNS)
        for row in self.rows:
            names.update(dict.fromkeys(row.columns))
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
    """Reads sources row by row; skips and lists bad rows, or raises at the first."""

    reader: RowReader
    template_kwargs: Mapping[str, Any]
    max_prompt_tokens: int | None
    skip: bool
    required: frozenset[str]
    bad_rows: list[dict[str, Any]] = field(default_factory=list)

    def read(self, source: Source) -> Table:
        before = len(self.bad_rows)
        seen: dict[str, int] = {}
        rows: list[Row] = []
        batch: list[Row] = []
        any_row = False
        for record in source.records:
            any_row = True
            try:
                if record.error is not None:
                    raise BadRow(record.error)
                row = self.reader.read(record.line, record.value)
                self._refuse_duplicate(row, seen, source.unit)
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
        if not any_row:
            raise UserError(f"{source.name} is empty: it has no rows.")
        if not rows:
            bad = self.bad_rows[before]
            raise UserError(
                f"{source.name}: all {len(self.bad_rows) - before} rows are bad, so nothing is left. "
                f"The first: {source.unit} {bad['line']}: {_sentence(bad['reason'])}"
            )
        return Table(source, rows)

    def _refuse(self, source: Source, line: int, reason: str) -> None:
        if not self.skip:
            raise UserError(f"{source.place(line)}: {_sentence(reason)} {SKIP_HINT}")
        self.bad_rows.append({"file": source.name, "line": line, "reason": reason})

    def _refuse_duplicate(self, row: Row, seen: dict[str, int], unit: str) -> None:
        if "id" not in row.present:
            return
        first = seen.setdefault(row.columns["id"], row.line)
        if first != row.line:
            raise BadRow(f"the id '{row.columns['id']}' is already that of {unit} {first}; ids must differ")

    def _short_enough(self, rows: list[Row], source: Source) -> list[Row]:
        """The rows whose prompts are within the limit."""
        if self.max_prompt_tokens is None or not rows:
            return rows
        texts, renderable = [], []
        for row in rows:
            prompt = row.columns["prompt"]
            try:
                texts.append(
                    prompt
                    if isinstance(prompt, str)
                    else chat.render(self.reader.tokenizer, prompt, self.template_kwargs)
                )
            except Exception as error:  # templates refuse roles or orders of turns by raising what they like
                self._refuse(source, row.line, f"the chat template refuses these messages: {error}")
                continue
            renderable.append(row)
        kept = []
        counts = chat.lengths(self.reader.tokenizer, texts, self.reader.conversational) if texts else []
        for row, tokens in zip(renderable, counts, strict=True):
            if tokens <= self.max_prompt_tokens:
                kept.append(row)
            else:
                limit = f"data.max_prompt_tokens={self.max_prompt_tokens}"
                self._refuse(
                    source,
                    row.line,
                    f"the prompt has {tokens} tokens, more than {limit}; raise that or shorten the prompt",
                )
        return kept

    def _complete(self, rows: list[Row], source: Source) -> list[Row]:
        """The rows without those that lack a field which is required, or which other rows of the file have."""
        for name, column in (("answer", "answer"), ("demonstration", "golden_response"), ("id", "id")):
            required, shared = name in self.required, any(name in row.present for row in rows)
            if not required and not shared:
                continue
            kept, field_name = [], getattr(self.reader.fields, name)
            for row in rows:
                if row.columns[column] and (name in row.present or name == "demonstration"):
                    kept.append(row)
                elif name in row.present and not required:
                    kept.append(row)  # an explicit null
                elif name in row.present:
                    self._refuse(source, row.line, f"field '{field_name}' is empty, and every row must have it")
                else:
                    self._refuse(source, row.line, self._missing(row, field_name, required))
            rows = kept
        return rows

    def _missing(self, row: Row, field_name: str, required: bool) -> str:
        names = [name for name in row.columns if name not in TYPED_COLUMNS]
        others = f"; its other fields: {', '.join(names)}{guess(field_name, names)}" if names else ""
        why = "every row must have it" if required else "other rows have it (where there is none, write null)"
        return f"no field '{field_name}', and {why}{others}"
