"""Old skills as EleutherAI's lm-eval measures them, on the model in memory: adapters and unsaved steps included.

lm-eval is imported when the first evaluation begins: it takes seconds, and brings scikit-learn into transformers.
"""

import logging
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from selfdistill.errors import UserError, shortened
from selfdistill.evaluation.evaluator import RETENTION, EvalSettings, Evaluation, Item
from selfdistill.limits import number
from selfdistill.models.structure import evaluating, inner_model

FILES = (".yaml", ".yml")
INSTALL = "pip install 'selfdistill[lm_eval]'"


@dataclass
class HarnessSettings(EvalSettings):
    """The option `eval=lm_eval`: the old skills of `EvalSettings`, and tasks of lm-eval beside them.

    Attributes:
        tasks: names of lm-eval's tasks and groups, or YAML files of one's own in its format.
        metric: which of a task's metrics counts, e.g. acc_norm; None: the first for which more is better.
        num_fewshot: examples in the prompt; None: as each task has it.
        limit: rows of each task at most, its first ones; None: all.
        apply_chat_template: whether lm-eval's prompts become messages.
        chat_template_kwargs: passed to the chat template.
        trusted_prefixes: with "lm_eval" among them, YAML files may call Python functions (`!function`).

    Raises:
        UserError: lm-eval is not installed, no task is named, a file is not there, or would run code.
    """

    tasks: Sequence[str] = ()
    metric: str | None = None
    num_fewshot: int | None = field(default=None, metadata=number(0))
    limit: int | None = field(default=None, metadata=number(1))
    apply_chat_template: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    trusted_prefixes: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if find_spec("lm_eval") is None:
            raise UserError(f"eval=lm_eval: lm-eval is not installed. {INSTALL} brings it.")
        if not self.tasks or isinstance(self.tasks, str):
            raise UserError(
                "eval.tasks: write a list of lm-eval's tasks or of YAML files, e.g. eval.tasks=[hellaswag]."
            )
        for name in self.tasks:
            if name.endswith(FILES):
                _check_file(name, Path(name), trusted="lm_eval" in self.trusted_prefixes)

    def measure(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, seed: int) -> Evaluation:
        """Each task's score as `eval/retention/TASK`, and its rows.

        Raises:
            UserError: there is no such task, its data cannot be had, or it has no metric that can count.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        with _undisturbed(), evaluating(model):
            try:
                answering = HFLM(
                    pretrained=inner_model(model),
                    backend="causal",
                    tokenizer=deepcopy(tokenizer),  # it is given a padding token
                    batch_size=self.batch_size,
                    chat_template_args=dict(self.chat_template_kwargs),
                )
                found: Any = lm_eval.simple_evaluate(
                    model=answering,
                    tasks=[*self._groups.values(), *self._alone.values()],
                    task_manager=self._manager,
                    num_fewshot=self.num_fewshot,
                    limit=self.limit,
                    bootstrap_iters=0,
                    apply_chat_template=self.apply_chat_template,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                )
            except UserError:
                raise
            except Exception as error:  # whatever a task's data, its templates and its metrics stumble over
                raise UserError(
                    f"eval.tasks: lm-eval failed: {shortened(f'{type(error).__name__}: {error}')}"
                ) from error
        return self._read(found)

    @cached_property
    def _manager(self) -> Any:
        from lm_eval.tasks import TaskManager

        return TaskManager(include_defaults=not all(name.endswith(FILES) for name in self.tasks))

    @cached_property
    def _loaded(self) -> Any:
        """Tasks and groups by name, as lm-eval loads them."""
        for name in self.tasks:
            if not name.endswith(FILES) and name not in self._manager.task_index:
                raise UserError(
                    f"eval.tasks: lm-eval has no task {shortened(name)}, and it is no YAML file. "
                    "`lm_eval ls tasks` lists them."
                )
        return self._manager.load(list(self.tasks))

    @property
    def _groups(self) -> dict[str, Any]:
        """The groups that belong to no other one."""
        groups = self._loaded["groups"]
        inner = {sub.name for name, group in groups.items() for sub in group.get_all_groups() if sub.name != name}
        return {name: group for name, group in groups.items() if name not in inner}

    @property
    def _alone(self) -> dict[str, Any]:
        """The tasks that belong to none of the groups."""
        grouped = {task.task_name for group in self._groups.values() for task in group.get_all_tasks()}
        return {name: task for name, task in self._loaded["tasks"].items() if name not in grouped}

    def _read(self, found: Mapping[str, Any]) -> Evaluation:
        """A group that lm-eval puts together counts as one suite, and so does every task that is in none."""
        suites = dict(self._alone)
        for name, group in self._groups.items():
            whole = any("," in key for key in found["results"].get(name) or {})
            suites |= {name: group} if whole else {task.task_name: task for task in group.get_all_tasks()}
        metrics: dict[str, float] = {}
        items: list[Item] = []
        for suite in suites:
            key = self._metric(suite, found)
            metrics[f"{RETENTION}{suite}"] = float(found["results"][suite][key])
            for sample in found["samples"].get(suite) or ():
                items += _items(suite, sample, *key.split(","))
        return Evaluation(metrics, items)

    def _metric(self, suite: str, found: Mapping[str, Any]) -> str:
        """METRIC,FILTER of the number that counts."""
        known = [key for key in found["results"][suite] if "," in key and "_stderr," not in key]
        higher = found["higher_is_better"].get(suite) or {}
        wanted = [key for key in known if key.split(",")[0] == self.metric] if self.metric else known
        if not wanted:
            names = ", ".join(dict.fromkeys(key.split(",")[0] for key in known))
            raise UserError(f"eval.metric={self.metric}: the task {suite} has no such metric; it has {names}.")
        good = [key for key in wanted if higher.get(key.split(",")[0], True)]
        if not good:
            raise UserError(
                f"eval.tasks: of {suite}'s {wanted[0].split(',')[0]} less is better, and forgetting is what is lost of "
                "a score. Leave the task out, or name another of its metrics with eval.metric."
            )
        return good[0]


def _items(suite: str, sample: Mapping[str, Any], metric: str, filtered: str) -> Iterator[Item]:
    """A row as the model answered it; of several choices the answer is the likeliest one."""
    if sample.get("filter") != filtered:
        return
    requests, responses = _requests(sample["arguments"]), sample["filtered_resps"]
    answer = responses[0] if responses else ""
    if len(requests) > 1:
        likeliest = max(range(len(responses)), key=lambda place: float(responses[place][0]))
        answer = requests[likeliest][1]
    verdict = sample.get(metric)
    score = float(verdict) if isinstance(verdict, int | float | np.number) else None
    yield Item(suite, str(sample["doc_id"]), requests[0][0], str(answer), score)


def _requests(arguments: Any) -> list[Sequence[Any]]:
    """The arguments of each request, prompt first; lm-eval has them as lists, or by name once they are serialised."""
    rows = arguments.values() if isinstance(arguments, Mapping) else arguments
    return [tuple(row.values()) if isinstance(row, Mapping) else row for row in rows]


def _check_file(name: str, file: Path, *, trusted: bool) -> None:
    """Raises UserError unless a file of a task and those it includes are there, and run no code that is not trusted."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"eval.tasks={name}: {file} cannot be read: {error.strerror}.") from None
    if "!function" in text and not trusted:
        raise UserError(
            f"eval.tasks={name}: {file} calls Python functions (!function). If you know what they do: "
            "trusted_prefixes=[lm_eval]."
        )
    for included in re.findall(r"^include:\s*['\"]?([^'\"\s]+)", text, flags=re.MULTILINE):
        _check_file(name, file.parent / included, trusted=trusted)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """lm-eval seeds every generator, draws bars over the run's own table, and gives results to the first process alone.

    Here each process evaluates the same rows, and each is to know what was found.
    """
    logger, rank = logging.getLogger("lm_eval"), os.environ.get("LOCAL_RANK")
    level, python, numbers = logger.level, random.getstate(), np.random.get_state()
    logger.setLevel(logging.ERROR)
    if rank is not None:
        os.environ["LOCAL_RANK"] = "0"
    try:
        with torch.random.fork_rng(), redirect_stderr(StringIO()):
            yield
    finally:
        if rank is not None:
            os.environ["LOCAL_RANK"] = rank
        random.setstate(python)
        np.random.set_state(numbers)
        logger.setLevel(level)
