"""How likely the reference answer becomes after the completion's reasoning. No answer is ever parsed or compared."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from selfdistill.errors import UserError
from selfdistill.rewards.base import PolicyReward, answers_of, check_choice
from selfdistill.rewards.scorer import to_lists

Reduce = Literal["mean_prob", "prod", "geo_mean", "mean_logp"]


@dataclass(eq=False)
class AnswerLikelihood(PolicyReward):
    """r = f(L(x, z)) − f(L(x)), clipped to [0, 1], with L_i(x, z) = log π(a_i | x, z, delimiter, a_<i).

    z is the completion up to the delimiter, as it was sampled; the reference answer a replaces the model's own, by
    token ids. RLPR (arXiv 2506.18254, mean_prob, debiased) and VeriFree (arXiv 2505.21493, prod).

    Args:
        delimiter: what opens the answer, for instance `<answer>`; None takes the whole completion as reasoning, which
            the answer follows directly.
        reduce: `mean_prob` the mean token probability (robust to one unlikely token), `prod` the answer's probability,
            `geo_mean` its length-normalised probability, `mean_logp` the mean log-probability.
        debias: subtract the same without reasoning, so that easy answers earn nothing; `mean_logp` is not clipped.
        missing_delimiter: a completion that never writes the delimiter is taken as reasoning `whole`, or scores `zero`.
        answer_field: the column with the answer; where its value is None, the first of `golden_response` counts.

    A row with an empty completion, or without an answer, is not scorable (None).
    """

    delimiter: str | None = "<answer>"
    reduce: str = "mean_prob"
    debias: bool = True
    missing_delimiter: str = "whole"
    answer_field: str = "answer"

    def __post_init__(self) -> None:
        check_choice("reduce", self.reduce, get_args(Reduce))
        check_choice("missing_delimiter", self.missing_delimiter, ("whole", "zero"))
        if self.missing_delimiter == "zero" and (self.delimiter is None or self.reduce == "mean_logp"):
            raise UserError("reward.missing_delimiter=zero needs a delimiter and a reduce other than mean_logp")

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        prompt_ids, completion_ids = self._token_ids(prompts, completions, prompt_ids, completion_ids)
        accepted = answers_of(columns, self.answer_field, len(completion_ids), self.__name__)
        opening = self.scorer.encode(self.delimiter) if self.delimiter else []

        scores: list[float | None] = [None] * len(completion_ids)
        # Each question is a context and an answer; the number is its place in the pass of the policy.
        questions: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        with_reasoning: dict[int, int] = {}
        without_reasoning: dict[int, int] = {}
        for row, (prompt, ids, texts) in enumerate(zip(prompt_ids, completion_ids, accepted, strict=True)):
            content, answer = self.scorer.without_eos(ids), self.scorer.encode(texts[0]) if texts else []
            if not content or not answer:
                continue
            reasoning = self._reasoning(content)
            if reasoning is None and self.missing_delimiter == "zero":
                scores[row] = 0.0
                continue
            after = (*prompt, *(reasoning if reasoning is not None else [*content, *opening]))
            with_reasoning[row] = questions.setdefault((after, tuple(answer)), len(questions))
            if self.debias:  # completions of one prompt share this question
                bare = ((*prompt, *opening), tuple(answer))
                without_reasoning[row] = questions.setdefault(bare, len(questions))
        if questions:
            contexts, answers = (list(part) for part in zip(*questions, strict=True))
            values = [self._reduced(row) for row in to_lists(self.scorer.token_logprobs(contexts, answers))]
            for row, place in with_reasoning.items():
                value = values[place]
                scores[row] = self._debiased(value, values[without_reasoning[row]]) if self.debias else value
        return scores

    def _reasoning(self, content: list[int]) -> list[int] | None:
        """The sampled ids up to the end of the delimiter; None where it does not occur."""
        if not self.delimiter:
            return content
        decode = self.scorer.tokenizer.decode
        if self.delimiter not in decode(content):
            return None
        # The shortest prefix that holds the delimiter, by bisection: every longer one holds it too.
        low, high = 1, len(content)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.delimiter in decode(content[:middle]) else (middle + 1, high)
        text = decode(content[:low])
        tail = text[text.index(self.delimiter) + len(self.delimiter) :]
        if not tail.strip():
            return content[:low]
        # The last token also holds the beginning of the model's answer: only its part of the delimiter is encoded.
        before = decode(content[: low - 1])
        end = len(text) - len(tail)
        return [*content[: low - 1], *self.scorer.encode(text[len(before) : end])]

    def _reduced(self, logprobs: list[float]) -> float:
        total = math.fsum(logprobs)
        match self.reduce:
            case "mean_prob":
                return math.fsum(map(math.exp, logprobs)) / len(logprobs)
            case "prod":
                return math.exp(total)
            case "geo_mean":
                return math.exp(total / len(logprobs))
        return total / len(logprobs)

    def _debiased(self, value: float, baseline: float) -> float:
        gain = value - baseline
        return gain if self.reduce == "mean_logp" else min(1.0, max(0.0, gain))
