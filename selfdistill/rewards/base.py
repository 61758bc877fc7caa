"""What rewards share: their name, the policy that some of them ask, and the comparison with a row's accepted answers.

A reward is called as TRL calls one and returns one entry per completion: a float, None (the completion cannot be scored
and leaves the group's baseline), or {"score", "feedback"}.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

from torch import Tensor

from selfdistill.errors import UserError
from selfdistill.models.generation import tokenize
from selfdistill.rewards.batching import Ids
from selfdistill.rewards.scorer import PolicyScorer
from selfdistill.rollout import text_of

RewardFunction = Callable[..., Any]
Result = float | None | dict[str, Any]
Feedback = Literal["none", "verdict", "answer"]


class Reward:
    """A callable that scores completions: `reward(prompts=…, completions=…, completion_ids=…, **columns)`.

    A new reward is one class in one file; it need not derive from this one, which adds the name in the logs
    (`ExactMatch` → `exact_match`). Its `__init__` takes its settings; its `__call__` takes the lists above, and the
    dataset's other columns as keyword arguments:

        @dataclass(eq=False)
        class Brevity(Reward):
            most_tokens: int = 32

            def __call__(self, prompts, completions, completion_ids, **columns):
                return [-max(0.0, len(ids) / self.most_tokens - 1) for ids in completion_ids]

    In `my_rewards.py` it is used, and its settings are checked, with no further file:

        reward=function reward._target_=my_rewards.Brevity reward._partial_=false +reward.most_tokens=16
        trusted_prefixes=[my_rewards]

    A file `conf/reward/NAME.yaml` with `_target_` and the settings makes it `reward=NAME`. `Judge` is the base of
    rewards that compare with an answer, and `PolicyReward` of those that ask the policy.

    Attributes:
        verifiable: whether the score says how right a completion is, from 0 to 1, by itself: then it also judges the
            evaluation. A function of one's own declares it with `my_reward.verifiable = True`.
    """

    verifiable: ClassVar[bool] = False

    @property
    def __name__(self) -> str:  # type: ignore[override]
        return re.sub(r"(?<!^)(?=[A-Z])", "_", str(type(self).__name__)).lower()

    def __call__(self, *args: Any, **columns: Any) -> Sequence[Result]:
        raise NotImplementedError


@dataclass(frozen=True)
class Wrong:
    """Why a completion is wrong: what to say of it, and the sentence that also gives the answer away."""

    verdict: str
    answer: str


class BadAnswer(ValueError):
    """A reference answer that the reward cannot compare with; the message says what to correct."""


def is_verifiable(function: Any) -> bool:
    """Whether a reward, or a function of the user's own, says of itself that it tells right from wrong."""
    while isinstance(function, partial):  # what Hydra's `_partial_: true` makes
        function = function.func
    return bool(getattr(function, "verifiable", False))


@dataclass(eq=False)
class Judge(Reward):
    """1 for a right completion, 0 for a wrong one, None where the row has no answer. Subclasses give `judge` alone.

    Args:
        answer_field: the column with the answer, or with a list of accepted ones; where its value is None, the row's
            `golden_response` is the list.
        feedback: what is said about a wrong completion: nothing (`none`: plain floats are returned), that it is wrong
            (`verdict`), or also the `answer`. Nothing is said about a right one.

    Raises:
        UserError: a setting is not one of those that are offered, or a row's answer cannot be compared with.
    """

    verifiable: ClassVar[bool] = True

    answer_field: str = "answer"
    feedback: str = "verdict"

    def __post_init__(self) -> None:
        check_choice("feedback", self.feedback, get_args(Feedback))

    def judge(self, completion: str, answers: list[str]) -> Wrong | None:
        """What is wrong with the completion, or None; `answers` holds at least one. Raises BadAnswer."""
        raise NotImplementedError

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Result]:
        accepted = answers_of(columns, self.answer_field, len(completions), self.__name__)
        return [
            self._result(text_of(completion), answers, row) if answers else None
            for row, (completion, answers) in enumerate(zip(completions, accepted, strict=True))
        ]

    def _result(self, completion: str, answers: list[str], row: int) -> Result:
        try:
            wrong = self.judge(completion, answers)
        except BadAnswer as error:
            raise UserError(f"reward {self.__name__}, row {row} of the batch: {error}") from None
        score = float(wrong is None)
        if self.feedback == "none":
            return score
        return {"score": score, "feedback": None if wrong is None else self._text(wrong)}

    def _text(self, wrong: Wrong) -> str:
        """The feedback on a wrong completion."""
        return f"{wrong.verdict} {wrong.answer}" if self.feedback == "answer" else wrong.verdict


@runtime_checkable
class AsksPolicy(Protocol):
    """A reward that is given the policy before its first call."""

    def bind(self, scorer: PolicyScorer) -> None:
        """Use this scorer from now on."""


class PolicyReward(Reward):
    """A reward that asks the current policy for log-probabilities. Subclasses give `_scores` alone.

    It judges the model as it is, at temperature 1, whatever the sampling temperature. TRL's own log-probabilities,
    which are at that temperature, take the place of a pass only where it is 1.

    Raises:
        ValueError: no policy is bound, or `policy_logprobs` has not one value for each completion token.
    """

    _scorer: PolicyScorer | None = None

    def bind(self, scorer: PolicyScorer) -> None:
        """Use this scorer from now on."""
        self._scorer = scorer

    @property
    def scorer(self) -> PolicyScorer:
        if self._scorer is None:
            raise ValueError(f"{type(self).__name__} needs the policy: call bind(PolicyScorer(model, tokenizer)) first")
        return self._scorer

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Ids | None = None,
        prompt_ids: Ids | None = None,
        policy_logprobs: Sequence[Tensor] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Scores by token ids. Our trainer gives them; for another caller, they are encoded from the text."""
        if prompt_ids is None:
            prompt_ids = [tokenize(prompt, self.scorer.tokenizer) for prompt in prompts]
        if completion_ids is None:
            completion_ids = [self.scorer.encode(text_of(completion)) for completion in completions]
        given, wanted = ([len(row) for row in rows] for rows in (policy_logprobs or [], completion_ids))
        if policy_logprobs is not None and given != wanted:
            raise ValueError(f"policy_logprobs has {given} values a row, the completions have {wanted} tokens")
        return self._scores([list(i) for i in prompt_ids], [list(i) for i in completion_ids], policy_logprobs, columns)

    def _scores(
        self, prompt_ids: Ids, completion_ids: Ids, logprobs: Sequence[Tensor] | None, columns: Mapping[str, Any]
    ) -> list[float | None]:
        """The score of each completion; `logprobs` are those of its own tokens, where they are known already."""
        raise NotImplementedError

    def _answers(self, columns: Mapping[str, Any], field: str, count: int) -> list[list[int]]:
        """The first accepted answer of each row as token ids; of a row without an answer, none."""
        accepted = answers_of(columns, field, count, self.__name__)
        return [self.scorer.encode(texts[0]) if texts else [] for texts in accepted]


def check_choice(key: str, value: str, allowed: Sequence[str]) -> None:
    """Raises UserError unless the setting `reward.KEY` has one of the allowed values."""
    if value not in allowed:
        raise UserError(f"reward.{key} is {value!r}; write one of {', '.join(allowed)}")


def answers_of(columns: Mapping[str, Any], field: str, count: int, reward: str) -> list[list[str]]:
    """All accepted answers of each row: the value (or list) in column `field`, or where that is None `golden_response`.

    A row without either has an empty list. Raises UserError when neither column is there at all.
    """
    if field not in columns and "golden_response" not in columns:
        known = ", ".join(sorted(key for key, value in columns.items() if isinstance(value, list))) or "none"
        raise UserError(
            f"reward {reward} needs the column {field!r}, and the dataset does not have it (columns: {known}). "
            f"Name the right column with reward.answer_field=NAME, or choose a reward that needs no answer."
        )
    nothing = [None] * count
    first, second = columns.get(field) or nothing, columns.get("golden_response") or nothing
    return [_as_texts(a if a is not None else b) for a, b in zip(first, second, strict=True)]


def _as_texts(value: Any) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [str(item) for item in values if item is not None]


def shorten(text: str, characters: int) -> str:
    """The text within a budget, its middle replaced by an ellipsis when it is longer."""
    if len(text) <= characters:
        return text
    head = (characters - 3) * 2 // 3
    return f"{text[:head]}...{text[len(text) - (characters - 3 - head) :]}"
