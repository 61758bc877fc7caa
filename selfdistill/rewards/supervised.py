"""How well a completion's positions predict the expected answer, weighted by how much of the answer they cover."""

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from selfdistill.errors import UserError
from selfdistill.rewards.base import PolicyReward, answers_of, check_policy_logprobs
from selfdistill.rewards.scorer import to_lists

Mode = Literal["completion_cross_entropy", "answer_perplexity"]
Coverage = Literal["divide", "pad", "additive", "prob", "seed"]

SEED_WARNING = (
    "reward.coverage=seed multiplies a score that is never above 0 by the coverage, so short completions are PAID: a "
    "one-token completion scores 0, the highest possible, and the exact answer less. It also ignores the prompt and "
    "compares each position with the wrong answer token. Use it to reproduce that formula only; "
    "reward.coverage=divide does what coverage is meant for."
)


class Supervised(PolicyReward):
    """Coverage-weighted fit to the answer a; y is the completion, cov = min(1, |y| / |a|), m = min(|y|, |a|),
    where m, not cov, counts an emitted EOS with y.

    Modes:
        completion_cross_entropy: CE = mean over i < m of −log π(a_i | x, y_<i), the answer's tokens scored where the
            completion stands. Position-locked: a correct answer that is worded or placed differently scores low, and
            the last answer token is never conditioned on (see `include_eos`).
        answer_perplexity: PPL = exp(mean over i of −log π(a_i | x, a_<i)). The completion enters by its length alone,
            so completions at least as long as the answer all score the same. `AnswerLikelihood` is the better choice.

    Coverage, with C = CE or PPL; every form but `seed` falls as a completion of equal cross-entropy is cut short:
        divide: −C / cov
        pad: −mean over all |a| tokens, the |a| − m missing ones at `missing_nats` each, or at CE where that is more
            (exp of the mean in mode answer_perplexity)
        additive: −C − `coverage_weight` · (1 − cov)
        prob: cov · exp(−CE), in [0, 1]
        seed: the published formula −C · cov, in mode completion_cross_entropy without the prompt and with each position
            compared with the answer token before the one it predicts. It pays for short completions, and warns.

    Args:
        answer_field: the column with the answer; where its value is None, the first of `golden_response` counts.
        missing_nats: price of a missing token under `pad`; None = ln V, what a uniform guess costs.
        coverage_weight: nats that a wholly missing answer costs under `additive`.
        include_eos: the answer ends with EOS too. Without it an answer of one token scores the same whatever the
            completion says.
        overlong_weight: subtracts overlong_weight · max(0, |y| / |a| − overlong_ratio), without EOS; 0 = off.
        overlong_ratio: length relative to the answer from which a completion is too long.

    A row with an empty completion, or without an answer, is not scorable (None).
    """

    def __init__(
        self,
        mode: str = "completion_cross_entropy",
        coverage: str = "divide",
        answer_field: str = "answer",
        missing_nats: float | None = None,
        coverage_weight: float = 1.0,
        include_eos: bool = False,
        overlong_weight: float = 0.0,
        overlong_ratio: float = 1.0,
    ) -> None:
        for key, value, allowed in (("mode", mode, get_args(Mode)), ("coverage", coverage, get_args(Coverage))):
            if value not in allowed:
                raise UserError(f"reward.{key} is {value!r}; write one of {', '.join(allowed)}")
        for key, number in (("coverage_weight", coverage_weight), ("overlong_weight", overlong_weight)):
            if number < 0:
                raise UserError(f"reward.{key} is {number}; write a number of at least 0")
        if coverage == "seed":
            warnings.warn(SEED_WARNING, stacklevel=2)
        self.mode = mode
        self.coverage = coverage
        self.answer_field = answer_field
        self.missing_nats = missing_nats
        self.coverage_weight = coverage_weight
        self.include_eos = include_eos and coverage != "seed"  # that formula knows no EOS
        self.overlong_weight = overlong_weight
        self.overlong_ratio = overlong_ratio

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        policy_logprobs: Sequence[Tensor] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        prompt_ids, sampled = self._token_ids(prompts, completions, prompt_ids, completion_ids)
        accepted = answers_of(columns, self.answer_field, len(sampled), self.__name__)
        answers = [self.scorer.encode(texts[0]) if texts else [] for texts in accepted]
        texts = [self.scorer.without_eos(ids) for ids in sampled]
        scorable = [bool(y and a) for y, a in zip(texts, answers, strict=True)]
        # CE goes one token further where EOS was emitted: a confident policy that stops too early, for which the tokens
        # before cost nothing, pays for what it should have written there. Without this, training ends in one letter.
        written = texts if self.coverage == "seed" else sampled
        if self.include_eos:
            answers = [[*a, self.scorer.tokenizer.eos_token_id] for a in answers]  # unscorable rows are skipped below
        if policy_logprobs is not None:
            check_policy_logprobs(policy_logprobs, sampled)

        rows = [row for row, yes in enumerate(scorable) if yes]
        own = to_lists(policy_logprobs) if policy_logprobs is not None else None
        nats = self._nats(rows, prompt_ids, written, answers, own)
        scores: list[float | None] = [None] * len(sampled)
        for row in rows:
            covered = len(written[row] if self.include_eos else texts[row])
            scores[row] = self._combine(nats[row], covered, len(answers[row])) - self._overlong(
                len(texts[row]), len(answers[row]) - self.include_eos
            )
        return scores

    def _overlong(self, written: int, wanted: int) -> float:
        """The penalty for a completion that goes on past the answer; neither length counts EOS."""
        return self.overlong_weight * max(0.0, written / wanted - self.overlong_ratio)

    def _nats(
        self,
        rows: list[int],
        prompts: list[list[int]],
        written: list[list[int]],
        answers: list[list[int]],
        own: list[list[float]] | None,
    ) -> dict[int, list[float]]:
        """Cross-entropy of each answer token, row by row; a pass of the policy only for what is not known already."""
        known: dict[int, list[float]] = {}
        asked: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for row in rows:
            y, a = written[row], answers[row]
            context, targets = (a, a) if self.mode == "answer_perplexity" else (y, a[: len(y)])
            prompt = prompts[row]
            if self.mode == "completion_cross_entropy" and self.coverage == "seed":
                prompt, context, targets = y[:1], y[1:], a[: len(y) - 1]
            elif own is not None and y[: len(targets)] == targets:
                # The completion is the answer so far: its own log-probabilities are what is asked for.
                known[row] = [-value for value in own[row][: len(targets)]]
                continue
            context = context[: len(targets)]
            # Equal questions are asked once; with answer_perplexity a whole group shares one.
            asked.setdefault((tuple(prompt), tuple(context), tuple(targets)), []).append(row)
        if asked:
            questions = list(asked)
            found = to_lists(self.scorer.token_logprobs(*(list(part) for part in zip(*questions, strict=True))))
            for question, values in zip(questions, found, strict=True):
                for row in asked[question]:
                    known[row] = [-value for value in values]
        return known

    def _combine(self, nats: list[float], written: int, wanted: int) -> float:
        cover = min(1.0, written / wanted)
        if not nats:  # only under `seed`, whose shift leaves nothing of a one-token completion
            return 0.0
        perplexity = self.mode == "answer_perplexity"
        mean = math.fsum(nats) / len(nats)
        cost = _exp(mean) if perplexity else mean
        match self.coverage:
            case "seed":
                return -cost * cover
            case "divide":
                score = -cost / cover
            case "pad":
                covered = nats[: min(written, wanted)]
                price = math.log(self.scorer.vocabulary_size) if self.missing_nats is None else self.missing_nats
                price = max(price, mean)
                padded = (math.fsum(covered) + (wanted - len(covered)) * price) / wanted
                score = -_exp(padded) if perplexity else -padded
            case "additive":
                score = -cost - self.coverage_weight * (1 - cover)
            case "prob":
                score = cover * math.exp(-mean)
        return score


def _exp(nats: float) -> float:
    """exp, kept finite: a reward must not be infinite."""
    return math.exp(min(nats, 80.0))
