"""How likely the reference answer becomes after the completion's reasoning. No answer is ever parsed or compared."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from selfdistill.errors import UserError
from selfdistill.rewards.base import PolicyReward, check_choice
from selfdistill.rewards.batching import Ids
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

    def _scores(
        self, prompt_ids: Ids, completion_ids: Ids, logprobs: Sequence[Tensor] | None, columns: Mapping[str, Any]
    ) -> list[float | None]:
        answers = self._answers(columns, self.answer_field, len(completion_ids))
        # Written in the configuration and not by anybody in the data, so a special token in it is one.
        opening = self.scorer.tokenizer(self.delimiter, add_special_tokens=False)["input_ids"] if self.delimiter else []

        scores: list[float | None] = [None] * len(completion_ids)
        # Each question is a context and an answer; the number is its place in the pass of the policy.
        questions: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        places: dict[int, list[int]] = {}
        for row, (prompt, ids, answer) in enumerate(zip(prompt_ids, completion_ids, answers, strict=True)):
            content = self.scorer.without_eos(ids)
            if not content or not answer:
                continue
            reasoning = self._reasoning(content)
            if reasoning is None and self.missing_delimiter == "zero":
                scores[row] = 0.0
                continue
            contexts = [(*prompt, *(reasoning if reasoning is not None else [*content, *opening]))]
            if self.debias:  # completions of one prompt share this question
                contexts.append((*prompt, *opening))
            asked = [(context, tuple(answer)) for context in contexts]
            places[row] = [questions.setdefault(question, len(questions)) for question in asked]
        # Without a question too: where the policy is sharded its passes take all processes, whoever has questions.
        batch: Any = [list(part) for part in zip(*questions, strict=True)] or [[], []]
        values = [self._reduced(row) for row in to_lists(self.scorer.token_logprobs(*batch))]
        for row, (place, *bare) in places.items():
            gain = values[place] - sum(values[other] for other in bare)
            scores[row] = min(1.0, max(0.0, gain)) if bare and self.reduce != "mean_logp" else gain
        return scores

    def _reasoning(self, content: list[int]) -> list[int] | None:
        """The sampled ids up to the end of the delimiter; None where it does not occur."""
        if not self.delimiter:
            return content

        def decoded(tokens: int) -> str:
            return str(self.scorer.tokenizer.decode(content[:tokens]))

        opening = self.delimiter
        if opening not in decoded(len(content)):
            return None
        # The shortest prefix that holds the delimiter: every longer one holds it too.
        tokens = bisect_left(range(len(content)), True, lo=1, key=lambda tokens: opening in decoded(tokens))
        text = decoded(tokens)
        end = text.index(opening) + len(opening)
        if not text[end:].strip():
            return content[:tokens]
        # The last token also holds the beginning of the model's answer: only its part of the delimiter is encoded.
        return [*content[: tokens - 1], *self.scorer.encode(text[len(decoded(tokens - 1)) : end])]

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
