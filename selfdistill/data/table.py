"""The rows of one file or hub dataset: read, checked together, and made into a dataset."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from selfdistill.config.suggestions import guess
from selfdistill.data.chat import Prompts, lengths
from selfdistill.data.rows import OPTIONAL, BadRow, CheckedRow, RowReader
from selfdistill.data.sources import RowSource
from selfdistill.errors import UserError, bounded, first_line, one_line

if TYPE_CHECKING:
    from datasets import Dataset

BATCH_ROWS = 512
TYPED_COLUMNS = ("prompt", "answer", "golden_response", "id")
# Names under which rewards receive other things than the dataset's columns.
RESERVED = frozenset(
    "prompts completions prompt_ids policy_logprobs trainer_state log_extra log_metric environments".split()
)
SKIP_HINT = "(data.on_bad_row=skip leaves such rows out.)"


@dataclass(frozen=True)
class Length:
    """Tokens of a prompt; `whole` is false where only its beginning was counted."""

    count: int
    whole: bool = True

    def __str__(self) -> str:
        return str(self.count) if self.whole else f"more than {self.count}"


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
            except (pa.ArrowException, OverflowError, TypeError, UnicodeEncodeError, RecursionError) as error:
                raise UserError(self._mixed(name, values, error)) from None
        try:
            return Dataset.from_dict(columns)
        except (pa.ArrowException, ValueError, TypeError) as error:  # a name or nesting that its format cannot hold
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{self.source.name}: the rows cannot be put into one table: {reason}") from None

    def _mixed(self, name: str, values: list[Any], error: Exception) -> str:
        kinds: dict[type, int] = {}
        for row, value in zip(self.rows, values, strict=True):
            if value is not None:
                kinds.setdefault(type(value), row.line)
        listed = ", ".join(f"{kind.__name__} ({self.source.unit} {line})" for kind, line in kinds.items())
        first = min(kinds.values(), default=self.rows[0].line)
        return (
            f"{self.source.place(first)}: the field '{one_line(name)}' does not hold one kind of value in all rows: "
            f"{listed} "
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
    _too_long: list[tuple[int, "Length"]] = field(default_factory=list)
    _longest_token: int | None = None

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
        rows += self._short_enough(batch, source)
        self._refuse_too_long(source, len(rows) + len(self._too_long))
        rows = self._complete(rows, source)
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
        reason = one_line(reason)
        if self.on_bad_row == "error":
            raise UserError(f"{source.place(line)}: {_sentence(reason)} {SKIP_HINT}")
        self.bad_rows.append({"file": source.name, "line": line, "reason": bounded(reason)})

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
                reason = f"the chat template refuses these messages: {first_line(error)}{way_out}"
                self._refuse(source, row.line, reason)
        for row, tokens in zip(kept, self._lengths(texts, limit), strict=True):
            if tokens.count <= limit:
                short.append(row)
            elif self.on_bad_row == "skip":
                over = f"{tokens} tokens, more than data.max_prompt_tokens={limit}"
                self._refuse(source, row.line, f"the prompt has {over}; raise that or shorten the prompt")
            else:
                self._too_long.append((row.line, tokens))
        return short

    def _lengths(self, texts: list[str], limit: int) -> list["Length"]:
        """The prompts' tokens; of one that is far beyond the limit only the beginning is counted."""
        tokenizer, rendered = self.reader.tokenizer, self.reader.conversational
        if self._longest_token is None:
            self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)
        enough = (limit + 1) * self._longest_token  # so many characters are more tokens than the limit
        counted = [
            Length(count, whole=len(text) <= enough)
            for text, count in zip(texts, lengths(tokenizer, [t[:enough] for t in texts], rendered), strict=True)
        ]
        for index, length in enumerate(counted):
            if length.count <= limit and not length.whole:  # a tokenizer that leaves characters out
                counted[index] = Length(lengths(tokenizer, [texts[index]], rendered)[0])
        return counted

    def _refuse_too_long(self, source: RowSource, rows: int) -> None:
        """Raises one error about all prompts that are too long: how many there are, and the longest."""
        if not self._too_long:
            return
        too_long, self._too_long = self._too_long, []
        (first, tokens), limit = too_long[0], self.prompts.max_prompt_tokens
        reason = f"the prompt has {tokens} tokens, more than data.max_prompt_tokens={limit}; "
        line, longest = max(too_long, key=lambda item: item[1].count)
        if len(too_long) == 1:
            reason += "raise that or shorten the prompt"
        else:
            reason += (
                f"so have {len(too_long)} of {rows} prompts, and the longest ({source.unit} {line}) has {longest}: "
            )
            reason += f"write data.max_prompt_tokens={longest.count}" if longest.whole else "shorten them"
        raise UserError(f"{source.place(first)}: {_sentence(reason)} {SKIP_HINT}")

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
