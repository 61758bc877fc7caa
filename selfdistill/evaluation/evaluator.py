"""What a model can do: accuracy on the new task, retention of the old skills, and how much was forgotten."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from selfdistill.data.chat import merged_system
from selfdistill.data.rows import BadRow, Fields, RowReader
from selfdistill.data.sources import open_source
from selfdistill.errors import UserError
from selfdistill.limits import check_limits, number
from selfdistill.models.generation import generate, tokenize
from selfdistill.rewards.result import normalise

Row = Mapping[str, Any]
Scorer = Callable[..., list[Any]]
RETENTION = "eval/retention/"  # before the name of a suite
PROBE = "eval/task/"  # before the name of another task


@dataclass(frozen=True)
class Item:
    """One row of an evaluation.

    Attributes:
        suite: the old skill that the row asks for, or task/NAME of another task; None for the new one.
        row: the row's id, or its number within its suite.
        prompt: a text, or messages.
        answer: what the model wrote, without special tokens.
        verdict: the score; None where the answer could not be judged.
    """

    suite: str | None
    row: str
    prompt: Any
    answer: str
    verdict: float | None


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation found: its metrics, and the rows that they are means of."""

    metrics: dict[str, float]
    items: list[Item]


@dataclass(frozen=True)
class Group:
    """Rows whose verdicts have a mean.

    Attributes:
        metric: the mean's name.
        suite: what its items are entered under.
        where: where the rows come from, and `key`, what names their judge, for messages.
    """

    metric: str
    suite: str | None
    where: str
    key: str
    rows: Sequence[Row]
    scorer: Scorer


def forgetting(before: Mapping[str, float], after: Mapping[str, float]) -> float | None:
    """How much of the old skills is lost: mean over suites s of max(0, before_s − after_s), in [0, 1].

    The forgetting measure of Chaudhry et al. (Riemannian Walk, arXiv:1801.10112, section 5) with a single earlier
    checkpoint, and cut off at zero, so that a gain on one skill does not hide a loss on another.

    Args:
        before, after: metrics of two evaluations, of which those named `eval/retention/SUITE` are read.

    Returns:
        None without suites.

    Raises:
        ValueError: the two evaluations do not cover the same suites.
    """
    earlier, later = ({k: v for k, v in m.items() if k.startswith(RETENTION)} for m in (before, after))
    if earlier.keys() != later.keys():
        raise ValueError(f"different suites: {sorted(earlier)} before, {sorted(later)} after")
    drops = [max(0.0, earlier[suite] - later[suite]) for suite in earlier]
    return fmean(drops) if drops else None


@dataclass
class EvalSettings:
    """The configuration group `eval`.

    Attributes:
        scorer: judges the task; a reward function, called with prompts, completions, completion_ids and the rows' other
            columns; returns a float, None (not scorable) or {"score": …} for each row. In a run None stands for the
            run's own reward where that is verifiable, and for exact match where it is not.
        retention_scorer: judges the old skills.
        every: evaluate every so many optimizer steps; 0: only before and after training.
        max_rows: rows of the task at most, the first of its evaluation split.
        max_new_tokens: longest answer, in tokens; in a run as long as a completion of the training.
        batch_size: rows generated at a time.
        temperature: 0 takes the likeliest token at each position; otherwise the answers are sampled with a fixed seed.
        retention_path: rows of the old skills, with the columns suite, prompt and what the scorer needs; or null.
        max_rows_per_suite: rows of each old skill at most, its first ones.

    Raises:
        UserError: a value out of its range.
    """

    scorer: Scorer | None
    retention_scorer: Scorer
    every: int = field(default=0, metadata=number(0))
    max_rows: int = field(default=200, metadata=number(1))
    max_new_tokens: int = field(default=64, metadata=number(1))
    batch_size: int = field(default=64, metadata=number(1))
    temperature: float = field(default=0.0, metadata=number(0))
    retention_path: str | None = None
    max_rows_per_suite: int = field(default=50, metadata=number(1))

    def __post_init__(self) -> None:
        check_limits(type(self), vars(self), lambda name: f"eval.{name}={getattr(self, name)}")

    def measure(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, seed: int) -> Evaluation:
        """What is measured otherwise than by rows with a scorer, as `eval/retention/SUITE`; nothing here."""
        return Evaluation({}, [])


class Evaluator:
    """Answers fixed rows with a model and scores the answers.

    Args:
        settings: `settings.scorer` must be there unless `scorer` is given.
        task: held-out rows of the new task. A row has `prompt` (a string, or messages) and whatever the scorer needs.
        retention: rows of each old skill, by suite.
        probes: held-out rows of other tasks, by name; judged and limited as those of the task.
        scorer: judges the task in place of `settings.scorer`.
        chat_template_kwargs: passed to the tokenizer's chat template, for example {"enable_thinking": False}.

    Raises:
        UserError: a row has no prompt.
    """

    def __init__(
        self,
        settings: EvalSettings,
        task: Iterable[Row],
        retention: Mapping[str, Sequence[Row]],
        *,
        probes: Mapping[str, Iterable[Row]] | None = None,
        scorer: Scorer | None = None,
        seed: int = 0,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings, self.seed, self.chat_template_kwargs = settings, seed, chat_template_kwargs
        self.scorer = scorer or settings.scorer
        if self.scorer is None:
            raise UserError("eval.scorer is null: name a reward that judges the answers.")
        judged, most = ("eval.scorer", self.scorer), settings.max_rows
        groups = [Group("eval/accuracy", None, "the evaluation data", *_judged(judged, task, most))]
        for name, rows in (probes or {}).items():
            groups.append(Group(f"{PROBE}{name}", f"task/{name}", f"probes.{name}", *_judged(judged, rows, most)))
        for suite, rows in retention.items():
            judge = f"eval.retention_scorer (suite '{suite}')", settings.retention_scorer
            groups.append(Group(f"{RETENTION}{suite}", suite, f"the retention suite '{suite}'", *_judged(judge, rows)))
        self.groups = [group for group in groups if group.rows]
        for group in self.groups:
            for index, row in enumerate(group.rows):
                if not row.get("prompt"):
                    raise UserError(f"row {index} of {group.where} has no prompt: write a 'prompt' that is not empty.")

    def evaluate(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        """Generate and score; the model's mode, generation settings and the random state are left as they were.

        Returns:
            the rows with answers and verdicts, and as metrics `eval/accuracy` (mean score over the task's rows that
            could be scored), `eval/task/NAME` (the same for another task), `eval/retention/SUITE` (for an old skill)
            and `eval/retention` (mean over the suites).

        Raises:
            UserError: a scorer could judge no row of its group.
        """
        prompts = [row["prompt"] for group in self.groups for row in group.rows]
        prompt_ids = [tokenize(prompt, tokenizer, self.chat_template_kwargs) for prompt in prompts]
        completion_ids = generate(
            model,
            prompt_ids,
            tokenizer=tokenizer,
            max_new_tokens=self.settings.max_new_tokens,
            batch_size=self.settings.batch_size,
            temperature=self.settings.temperature,
            seed=self.seed,
        )
        metrics: dict[str, float] = {}
        items: list[Item] = []
        start = 0
        for group in self.groups:
            span = slice(start, start + len(group.rows))
            start += len(group.rows)
            texts = tokenizer.batch_decode(completion_ids[span], skip_special_tokens=True)
            ids = {"completion_ids": completion_ids[span], "prompt_ids": prompt_ids[span]}
            verdicts = _scores(group.key, group.scorer, group.rows, texts, **ids)
            for place, (row, text, verdict) in enumerate(zip(group.rows, texts, verdicts, strict=True)):
                items.append(Item(group.suite, str(row.get("id") or place), row["prompt"], text, verdict))
            scores = [verdict for verdict in verdicts if verdict is not None]
            if not scores:
                raise UserError(
                    f"{group.key} could judge none of {len(group.rows)} rows of {group.where}: does the data have the "
                    "column it reads?"
                )
            metrics[group.metric] = fmean(scores)
        beyond = self.settings.measure(model, tokenizer, self.seed)
        metrics, items = metrics | beyond.metrics, items + beyond.items
        if retention := [value for name, value in metrics.items() if name.startswith(RETENTION)]:
            metrics["eval/retention"] = fmean(retention)
        return Evaluation(metrics, items)


def _judged(judge: tuple[str, Scorer], rows: Iterable[Row], most: int | None = None) -> tuple[str, list[Row], Scorer]:
    return judge[0], list(islice(rows, most)), judge[1]


def _scores(
    key: str, scorer: Scorer, rows: Sequence[Row], texts: Sequence[str], **ids: Sequence[list[int]]
) -> list[float | None]:
    """The score of each row. The scorer is called as TRL calls a reward: columns are lists, and the completion of
    messages is a message."""
    names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "suite"))
    results = scorer(
        prompts=[row["prompt"] for row in rows],
        completions=[
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ],
        **ids,
        **{name: [row.get(name) for row in rows] for name in names},
    )
    return normalise(results, key, len(rows))[0]


def load_retention(
    path: str | None, *, max_rows_per_suite: int, chat: bool = True, merge_system: bool = False
) -> dict[str, list[Row]]:
    """The first rows of each suite, from a file of any format of data with a column `suite`; nothing without a file.

    Args:
        chat: whether prompts become messages.
        merge_system: whether the system text goes into the first user turn.

    Raises:
        UserError: no such file, a row that cannot be read, or one without a suite; with file and line.
    """
    suites: dict[str, list[Row]] = {}
    if path is None:
        return suites
    source = open_source(path, key="eval.retention_path")
    reader = RowReader(Fields(), None, conversational=chat)
    for record in source.records:
        try:
            if record.error:
                raise BadRow(record.error)
            columns = reader.read(record.line, record.value).columns
            if not columns.get("suite"):
                raise BadRow("the field 'suite' is missing: it names the old skill that the row asks for")
        except BadRow as error:
            raise UserError(f"eval.retention_path: {source.place(record.line)}: {error}") from None
        if merge_system:
            columns["prompt"] = merged_system(columns["prompt"])
        rows = suites.setdefault(str(columns["suite"]), [])
        if len(rows) < max_rows_per_suite:
            rows.append(columns)
    if not suites:
        raise UserError(f"eval.retention_path: {path} is empty: it needs rows with suite, prompt and answer.")
    return suites
