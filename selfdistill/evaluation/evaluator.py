"""What a model can do: accuracy on the new task, retention of the old skills, and how much was forgotten."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from selfdistill.data.rows import BadRow, Fields, RowReader
from selfdistill.data.sources import open_source
from selfdistill.errors import UserError
from selfdistill.models.generation import completion_logits, generate, tokenize
from selfdistill.models.structure import evaluating
from selfdistill.rollout import Prompt

Row = Mapping[str, Any]
Scorer = Callable[..., list[Any]]


@dataclass(frozen=True)
class Sample:
    """One answered row. `suite` is None for the new task; `score` is None where the scorer could not judge the row."""

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

    def metrics(self, before: "Evaluation | None" = None) -> dict[str, float]:
        """Names and values to log; with the evaluation from before training also `eval/forgetting`."""
        named = {"eval/accuracy": self.accuracy}
        named |= {f"eval/retention/{suite}": value for suite, value in self.retention.items()}
        named["eval/retention"] = self.mean_retention
        if before is not None:
            named["eval/forgetting"] = forgetting(before, self)
        return {name: value for name, value in named.items() if value is not None}

    def summary(self) -> dict[str, Any]:
        """What the run's summary keeps: accuracy, retention by suite and its mean."""
        return {"accuracy": self.accuracy, "retention": self.retention, "mean_retention": self.mean_retention}


def forgetting(before: Evaluation, after: Evaluation) -> float | None:
    """How much of the old skills is lost: mean over suites s of max(0, before_s − after_s), in [0, 1]; None without suites.

    The forgetting measure of Chaudhry et al. (Riemannian Walk, arXiv:1801.10112, section 5) with a single earlier
    checkpoint, and cut off at zero, so that a gain on one skill does not hide a loss on another.

    Raises:
        ValueError: the two evaluations do not cover the same suites.
    """
    if before.retention.keys() != after.retention.keys():
        raise ValueError(f"different suites: {sorted(before.retention)} before, {sorted(after.retention)} after")
    drops = [max(0.0, before.retention[suite] - after.retention[suite]) for suite in before.retention]
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
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completion_ids[span]]
            scores = _scores(scorer, rows, texts, completion_ids[span], prompt_ids[span])
            known = [score for score in scores if score is not None]
            if not known:
                key = "eval.scorer" if suite is None else f"eval.retention_scorer (suite '{suite}')"
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
    if len(results) != len(rows):
        raise ValueError(f"the scorer returned {len(results)} scores for {len(rows)} completions")
    scores = [result["score"] if isinstance(result, Mapping) else result for result in results]
    return [None if score is None else float(score) for score in scores]


def reference_kl(
    model: torch.nn.Module,
    reference_context: Callable[[], AbstractContextManager[Any]],
    prompt_ids: Sequence[list[int]],
    completion_ids: Sequence[list[int]],
) -> float:
    """KL(π₀‖π) in nats a token: how far the policy π has moved from the one it started from, π₀, on these completions.

    On prompts of the new task it predicts how much of the old skills is forgotten (RL's Razor, arXiv:2509.04259,
    section 4). Exact over the vocabulary at each position, averaged over the completions' tokens; an estimate of the
    expectation under π₀ if the completions were sampled from π₀.

    Args:
        reference_context: inside it, `model` computes π₀; for LoRA `model.disable_adapter`.

    Raises:
        ValueError: no completion has a token.
    """
    total, tokens = 0.0, 0
    with evaluating(model):
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
            if not completion:
                continue
            policy = completion_logits(model, prompt, completion).log_softmax(-1)
            with reference_context():
                reference = completion_logits(model, prompt, completion).log_softmax(-1)
            total += float((reference.exp() * (reference - policy)).sum())
            tokens += len(completion)
    if not tokens:
        raise ValueError("no completion has a token")
    return total / tokens


def load_retention(path: str, *, max_rows_per_suite: int, chat: bool = True) -> dict[str, list[dict[str, Any]]]:
    """Rows by suite from a file of any format that the data may have, with a column `suite`; of each suite the first rows.

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
        """The evaluator of a run; `task` are the rows of the evaluation split, `chat` says whether prompts are messages."""
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

    Runs on the main process alone, so the model must not be sharded over processes.

    Attributes:
        last: the step and the evaluation made last; None before the first. Whoever evaluates after training can take
            it where it is of the last step.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        tokenizer: PreTrainedTokenizerBase,
        *,
        every: int,
        log: Callable[[int, dict[str, float]], None],
        before: Evaluation | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every}: must be at least 1")
        self.evaluator, self.tokenizer, self.every, self.log, self.before = evaluator, tokenizer, every, log, before
        self.last: tuple[int, Evaluation] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every or not state.is_world_process_zero:
            return
        evaluation = self.evaluator.evaluate(model, self.tokenizer)
        self.last = (state.global_step, evaluation)
        self.log(state.global_step, evaluation.metrics(self.before))
