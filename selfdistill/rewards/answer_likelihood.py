"""How likely the reference answer becomes after the completion's reasoning. No answer is ever parsed or compared."""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from selfdistill.errors import UserError
from selfdistill.rewards.base import PolicyReward, answers_of
from selfdistill.rewards.scorer import to_lists

Reduce = Literal["mean_prob", "prod", "geo_mean", "mean_logp"]


class AnswerLikelihood(PolicyReward):
    """r = f(L(x, z)) − f(L(x)), clipped to [0, 1], with L_i(x, z) = log π(a_i | x, z, delimiter, a_<i).

    z is the completion before the delimiter, as sampled; the model's own answer is dropped and the reference a stands
    in its place, by token ids. RLPR (arXiv 2506.18254, mean_prob, debiased) and VeriFree (arXiv 2505.21493, prod).

    Args:
        delimiter: what opens the answer, for instance `<answer>`; None takes the whole completion as reasoning and
            puts the answer right behind it.
        reduce: `mean_prob` the mean token probability (robust to one unlikely token), `prod` the answer's probability,
            `geo_mean` its length-normalised probability, `mean_logp` the mean log-probability.
        debias: subtract the same without reasoning, so that easy answers earn nothing; `mean_logp` is not clipped.
        missing_delimiter: a completion that never writes the delimiter is taken as reasoning `whole`, or scores `zero`.
        answer_field: the column with the answer; where its value is None, the first of `golden_response` counts.

    A row with an empty completion, or without an answer, is not scorable (None).
    """

    def __init__(
        self,
        delimiter: str | None = "<answer>",
        reduce: str = "mean_prob",
        debias: bool = True,
        missing_delimiter: str = "whole",
        answer_field: str = "answer",
    ) -> None:
        if reduce not in get_args(Reduce):
            raise UserError(f"reward.reduce is {reduce!r}; write one of {', '.join(get_args(Reduce))}")
        if missing_delimiter not in ("whole", "zero"):
            raise UserError(f"reward.missing_delimiter is {missing_delimiter!r}; write whole or zero")
        if missing_delimiter == "zero" and (delimiter is None or reduce == "mean_logp"):
            raise UserError("reward.missing_delimiter=zero needs a delimiter and a reduce other than mean_logp")
        self.delimiter = delimiter
        self.reduce = reduce
        self.debias = debias
        self.missing_delimiter = missing_delimiter
        self.answer_field = answer_field

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
        asked: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}  # (context, answer) → place in the pass
        pairs: dict[int, tuple[int, int]] = {}
        for row, (prompt, ids, texts) in enumerate(zip(prompt_ids, completion_ids, accepted, strict=True)):
            content, answer = self.scorer.without_eos(ids), self.scorer.encode(texts[0]) if texts else []
            if not content or not answer:
                continue
            reasoning = self._reasoning(content)
            if reasoning is None and self.missing_delimiter == "zero":
                scores[row] = 0.0
                continue
            after = (*prompt, *(reasoning if reasoning is not None else [*content, *opening]))
            questions = [(after, tuple(answer)), ((*prompt, *opening), tuple(answer))]
            with_it = asked.setdefault(questions[0], len(asked))
            # Completions of one prompt share the question without reasoning.
            pairs[row] = (with_it, asked.setdefault(questions[1], len(asked)) if self.debias else -1)
        if asked:
            contexts, answers = (list(part) for part in zip(*asked, strict=True))
            values = [self._reduced(row) for row in to_lists(self.scorer.token_logprobs(contexts, answers))]
            for row, (with_it, without) in pairs.items():
                scores[row] = self._debiased(values[with_it], values[without]) if self.debias else values[with_it]
        return scores

    def _reasoning(self, content: list[int]) -> list[int] | None:
        """The sampled ids up to and with the delimiter; None where it does not occur."""
        if not self.delimiter:
            return content
        decode = self.scorer.tokenizer.decode
        if self.delimiter not in decode(content):
            return None
        # The shortest prefix that holds the delimiter, by bisection: holding it is monotone in the length.
        low, high = 1, len(content)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.delimiter in decode(content[:middle]) else (middle + 1, high)
        text = decode(content[:low])
        tail = text[text.index(self.delimiter) + len(self.delimiter) :]
        if not tail.strip():
            return content[:low]
        # The last token also holds the beginning of the model's answer: write the delimiter's rest without it.
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
