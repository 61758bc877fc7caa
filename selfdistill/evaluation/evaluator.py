"""What a model can do: accuracy on the new task, retention of the old skills, and how much was forgotten."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from selfdistill.data.rows import BadRow, Fields, RowReader
from selfdistill.data.sources import open_source
from selfdistill.errors import UserError
from selfdistill.models.generation import generate, tokenize
from selfdistill.rewards.result import normalise
from selfdistill.rollout import Prompt

Row = Mapping[str, Any]
Scorer = Callable[..., list[Any]]
RETENTION = "eval/retention/"  # before the name of a suite


@dataclass(frozen=True)
class Sample:
    """One answered row. `suite` is None for the new task, `score` is None where the scorer could not judge the row."""

    suite: str | None
    prompt: Prompt
    prompt_ids: list[int]
    completion: str
    completion_ids: list[int]
    answer: str | None
    score: float | None


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one evaluation.

    Attributes:
        accuracy: mean score over the task's rows that could be scored; None without task rows.
        retention: mean score of each old skill.
        mean_retention: mean over the suites, each with the same weight; None without suites.
        samples: every answered row, in the order of the rows: the task first, then the suites.
    """

    accuracy: float | None
    retention: dict[str, float]
    mean_retention: float | None
    samples: list[Sample] = field(repr=False)

    def metrics(self) -> dict[str, float]:
        """Names and values to log; what could not be measured is left out."""
        named = {"eval/accuracy": self.accuracy}
        named |= {f"{RETENTION}{suite}": value for suite, value in self.retention.items()}
        named["eval/retention"] = self.mean_retention
        return {name: value for name, value in named.items() if value is not None}


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
    return sum(drops) / len(drops) if drops else None


class Evaluator:
    """Answers fixed rows with a model and scores the answers.

    Args:
        task: held-out rows of the new task. A row has `prompt` (a string, or messages) and whatever the scorer needs.
        retention: rows of each old skill, by suite.
        scorer: judges the task; a reward function, called with prompts, completions, completion_ids and the rows' other
            columns; returns a float, None (not scorable) or {"score": …} for each row.
        retention_scorer: judges the suites.
        max_new_tokens: longest answer, in tokens.
        batch_size: rows generated at a time.
        temperature: 0 takes the likeliest token at each position; otherwise the answers are sampled with `seed`.
        chat_template_kwargs: passed to the tokenizer's chat template, for example {"enable_thinking": False}.
    """

    def __init__(
        self,
        *,
        task: Sequence[Row],
        retention: Mapping[str, Sequence[Row]],
        scorer: Scorer,
        retention_scorer: Scorer,
        max_new_tokens: int = 64,
        batch_size: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.groups: list[tuple[str | None, Sequence[Row], Scorer]] = [(None, task, scorer)]
        self.groups += [(suite, rows, retention_scorer) for suite, rows in retention.items()]
        self.groups = [group for group in self.groups if len(group[1])]
        for suite, rows, _ in self.groups:
            for index, row in enumerate(rows):
                if not row.get("prompt"):
                    where = "the evaluation data" if suite is None else f"the retention suite '{suite}'"
                    raise UserError(f"row {index} of {where} has no prompt: write a 'prompt' that is not empty.")
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.temperature, self.seed = temperature, seed
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    def evaluate(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        """Generate and score; the model's mode, generation settings and the random state are left as they were.

        Raises:
            UserError: a scorer could judge no row of its group.
        """
        prompts = [row["prompt"] for _, rows, _ in self.groups for row in rows]
        prompt_ids = [tokenize(prompt, tokenizer, self.chat_template_kwargs) for prompt in prompts]
        completion_ids = generate(
            model,
            prompt_ids,
            tokenizer=tokenizer,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            temperature=self.temperature,
            seed=self.seed,
        )
        accuracy, retention, samples, start = None, {}, [], 0
        for suite, rows, scorer in self.groups:
            span = slice(start, start + len(rows))
            start += len(rows)
            texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in completion_ids[span]]
            key = "eval.scorer" if suite is None else f"eval.retention_scorer (suite '{suite}')"
            scores = _scores(key, scorer, rows, texts, completion_ids[span], prompt_ids[span])
            known = [score for score in scores if score is not None]
            if not known:
                raise UserError(f"{key} could judge none of {len(rows)} rows: does the data have the column it reads?")
            mean = sum(known) / len(known)
            if suite is None:
                accuracy = mean
            else:
                retention[suite] = mean
            samples += [
                Sample(suite, row["prompt"], prompt, text, ids, row.get("answer"), score)
                for row, prompt, text, ids, score in zip(
                    rows, prompt_ids[span], texts, completion_ids[span], scores, strict=True
                )
            ]
        mean_retention = sum(retention.values()) / len(retention) if retention else None
        return Evaluation(accuracy, retention, mean_retention, samples)


def _scores(
    key: str,
    scorer: Scorer,
    rows: Sequence[Row],
    texts: Sequence[str],
    completion_ids: Sequence[list[int]],
    prompt_ids: Sequence[list[int]],
) -> list[float | None]:
    """Call the scorer as TRL calls a reward: completions of messages are messages, columns are lists."""
    names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "suite"))
    results = scorer(
        prompts=[row["prompt"] for row in rows],
        completions=[
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ],
        completion_ids=list(completion_ids),
        prompt_ids=list(prompt_ids),
        **{name: [row.get(name) for row in rows] for name in names},
    )
    scores, _ = normalise(results, key, len(rows))
    return scores


def load_retention(path: str, *, max_rows_per_suite: int, chat: bool = True) -> dict[str, list[dict[str, Any]]]:
    """Rows of each suite, at most so many and the first ones, from a file with a column `suite` in any format of data.

    Raises:
        UserError: no such file, a row that cannot be read, or one without a suite; with file and line.
    """
    source = open_source(path, key="eval.retention_path")
    reader = RowReader(Fields(), None, conversational=chat)
    suites: dict[str, list[dict[str, Any]]] = {}
    for record in source.records:
        try:
            if record.error:
                raise BadRow(record.error)
            columns = reader.read(record.line, record.value).columns
            if not columns.get("suite"):
                raise BadRow("the field 'suite' is missing: it names the old skill that the row asks for")
        except BadRow as error:
            raise UserError(f"eval.retention_path: {source.place(record.line)}: {error}") from None
        rows = suites.setdefault(str(columns["suite"]), [])
        if len(rows) < max_rows_per_suite:
            rows.append(columns)
    if not suites:
        raise UserError(f"eval.retention_path: {path} is empty: it needs rows with suite, prompt and answer.")
    return suites


@dataclass
class EvalSettings:
    """The configuration group `eval`.

    Attributes:
        every: evaluate every so many optimiser steps; 0: only before and after training.
        max_rows: rows of the task at most, the first of its evaluation split.
        max_new_tokens: longest answer, in tokens.
        batch_size: rows generated at a time.
        temperature: 0 is greedy.
        scorer: judges the task.
        retention_path: JSONL of the old skills, with the columns suite, prompt and what the scorer needs; or null.
        retention_scorer: judges the old skills.
        max_rows_per_suite: rows of each old skill at most, its first ones.
    """

    scorer: Scorer
    retention_scorer: Scorer
    every: int = 0
    max_rows: int = 200
    max_new_tokens: int = 64
    batch_size: int = 64
    temperature: float = 0.0
    retention_path: str | None = None
    max_rows_per_suite: int = 50

    def __post_init__(self) -> None:
        floors = {"every": 0, "max_rows": 1, "max_new_tokens": 1, "batch_size": 1, "temperature": 0}
        for name, floor in {**floors, "max_rows_per_suite": 1}.items():
            if getattr(self, name) < floor:
                raise UserError(f"eval.{name}={getattr(self, name)}: must be at least {floor}.")

    def evaluator(
        self,
        task: Iterable[Row],
        *,
        chat: bool = True,
        seed: int = 0,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Evaluator:
        """The evaluator of a run.

        Args:
            task: rows of the evaluation split.
            chat: whether prompts are messages.
        """
        retention = {}
        if self.retention_path is not None:
            retention = load_retention(self.retention_path, max_rows_per_suite=self.max_rows_per_suite, chat=chat)
        return Evaluator(
            task=list(islice(task, self.max_rows)),
            retention=retention,
            scorer=self.scorer,
            retention_scorer=self.retention_scorer,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            temperature=self.temperature,
            seed=seed,
            chat_template_kwargs=chat_template_kwargs,
        )


class EvalCallback(TrainerCallback):
    """Evaluates every `every` optimiser steps and hands the metrics to `log(step, metrics)`.

    Only the main process evaluates, so the model must not be sharded over processes.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        tokenizer: PreTrainedTokenizerBase,
        *,
        every: int,
        log: Callable[[int, dict[str, float]], Any],
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every}: must be at least 1")
        self.evaluator, self.tokenizer, self.every, self.log = evaluator, tokenizer, every, log

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and state.is_world_process_zero:
            self.log(state.global_step, self.evaluator.evaluate(kwargs["model"], self.tokenizer).metrics())
