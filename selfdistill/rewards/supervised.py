"""How well a completion's positions predict the expected answer, weighted by how much of the answer they cover."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selfdistill.errors import UserError
from selfdistill.rewards.base import PolicyReward, check_choice
from selfdistill.rewards.batching import Ids
from selfdistill.rewards.scorer import to_lists

Mode = Literal["completion_cross_entropy", "answer_perplexity"]
Coverage = Literal["divide", "pad", "additive", "prob", "seed"]

SEED_WARNING = (
    "reward.coverage=seed multiplies a score that is never above 0 by the coverage, so short completions are PAID: a "
    "one-token completion scores 0, the highest possible, and the exact answer less. It also ignores the prompt and "
    "compares each position with the wrong answer token. Use it to reproduce that formula only; "
    "reward.coverage=divide does what coverage is meant for."
)


@dataclass(eq=False)
class Supervised(PolicyReward):
    """How well the completion y predicts the answer a for the prompt x, lowered where y is shorter than a.

    Lengths |y| and |a| are in tokens without EOS. The coverage is cov = min(1, |y| / |a|). Of the answer, the first m
    tokens are scored: m = min(|y|, |a|), and one more than |y| where the completion ended with EOS, so that stopping
    early costs what the policy should have written there.

    Modes:
        completion_cross_entropy: CE = mean over i < m of −log π(a_i | x, y_<i): each answer token, predicted from what
            the completion says before that position. A correct answer in other words, or in another place, scores low,
            and the completion's last token is never read (see `include_eos`).
        answer_perplexity: PPL = exp(mean over i < m of −log π(a_i | x, a_<i)). Only the completion's length matters, so
            completions at least as long as the answer all score the same. `AnswerLikelihood` is the better choice.

    Coverage, with C = CE or PPL. Of two completions with equal C the shorter one scores lower, except under `seed`:
        divide: −C / cov
        pad: −mean over all |a| tokens, where each of the |a| − m missing ones costs `missing_nats`, or CE if that is
            more (exp of the mean in mode answer_perplexity)
        additive: −C − `coverage_weight` · (1 − cov)
        prob: cov · exp(−CE), in [0, 1]
        seed: the published formula −C · cov. In mode completion_cross_entropy it leaves out the prompt and compares
            each position with the answer token before the one that it predicts. It pays for short completions, and a
            warning says so.

    Args:
        answer_field: the column with the answer; where its value is None, the first of `golden_response` counts.
        missing_nats: price of a missing token under `pad`; None = ln V, what a uniform guess costs.
        coverage_weight: what a completely missing answer costs under `additive`, in nats.
        include_eos: EOS is scored as the answer's last token. Without it an answer of one token scores the same
            whatever the completion says.
        overlong_weight: w in the penalty w · max(0, |y| / |a| − overlong_ratio), which is subtracted; 0 = off.
        overlong_ratio: length relative to the answer from which a completion is too long.

    A row with an empty completion, or without an answer, is not scorable (None).
    """

    mode: str = "completion_cross_entropy"
    coverage: str = "divide"
    answer_field: str = "answer"
    missing_nats: float | None = None
    coverage_weight: float = 1.0
    include_eos: bool = False
    overlong_weight: float = 0.0
    overlong_ratio: float = 1.0

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))
        check_choice("coverage", self.coverage, get_args(Coverage))
        for key, number in (("coverage_weight", self.coverage_weight), ("overlong_weight", self.overlong_weight)):
            if number < 0:
                raise UserError(f"reward.{key} is {number}; write a number of at least 0")
        if self.coverage == "seed":
            warnings.warn(SEED_WARNING, stacklevel=3)
            self.include_eos = False  # that formula knows no EOS

    def check_answers(self, key: str, answers: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuses answers of one token, which the prompt alone predicts: every completion would score the same.

        Args:
            key: of this reward in the configuration.
            answers: texts; the first thousand are looked at.

        Raises:
            UserError: more than half of them are such answers.
        """
        looked_at = [str(answer) for answer in answers[:1000]]
        short = [text for text in looked_at if len(tokenizer(text, add_special_tokens=False)["input_ids"]) < 2]
        if not self.include_eos and 2 * len(short) > len(looked_at):
            raise UserError(
                f"{key}: {len(short)} of {len(looked_at)} answers have one token, e.g. {short[0][:40]!r}. It is "
                "predicted from the prompt alone, so that every completion scores the same and nothing is learned: "
                "write reward=answer_likelihood, which asks for the answer after the completion's reasoning."
            )

    def _scores(
        self, prompt_ids: Ids, completion_ids: Ids, logprobs: Sequence[Tensor] | None, columns: Mapping[str, Any]
    ) -> list[float | None]:
        answers = self._answers(columns, self.answer_field, len(completion_ids))
        texts = [self.scorer.without_eos(ids) for ids in completion_ids]
        scorable = [row for row, text in enumerate(texts) if text and answers[row]]
        # Where EOS was emitted, one more answer token is scored. Otherwise a policy that is sure of the first tokens
        # and stops there would pay nothing for it, and training would end in completions of one letter.
        written = texts if self.coverage == "seed" else completion_ids
        if self.include_eos:
            answers = [[*answer, self.scorer.tokenizer.eos_token_id] for answer in answers]
        own = None if logprobs is None else to_lists(logprobs)
        nats = self._nats(scorable, prompt_ids, written, answers, own)
        scores: list[float | None] = [None] * len(texts)
        for row in scorable:
            wanted, text = len(answers[row]), len(texts[row])
            score = self._combine(nats[row], len(written[row]) if self.include_eos else text, wanted)
            excess = text / (wanted - self.include_eos) - self.overlong_ratio
            scores[row] = score - self.overlong_weight * max(0.0, excess)
        return scores

    def _nats(
        self, rows: list[int], prompts: Ids, written: Ids, answers: Ids, own: list[list[float]] | None
    ) -> dict[int, list[float]]:
        """Cross-entropy of each answer token, for each of `rows`; the policy is asked for what `own` does not have."""
        known: dict[int, list[float]] = {}
        # Each question is a prompt, a context and the tokens to score there; the rows share it where it is the same.
        questions: dict[tuple[tuple[int, ...], ...], list[int]] = {}
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
            questions.setdefault((tuple(prompt), tuple(context), tuple(targets)), []).append(row)
        # Without a question too: where the policy is sharded its passes take all processes, whoever has questions.
        asked = [list(part) for part in zip(*questions, strict=True)] or [[], [], []]
        found = to_lists(self.scorer.token_logprobs(*asked))
        for sharing, values in zip(questions.values(), found, strict=True):
            for row in sharing:
                known[row] = [-value for value in values]
        return known

    def _combine(self, nats: list[float], written: int, wanted: int) -> float:
        cover = min(1.0, written / wanted)
        if not nats:  # only under `seed`, whose shift leaves nothing of a one-token completion
            return 0.0
        cost_of = _exp if self.mode == "answer_perplexity" else float
        mean = math.fsum(nats) / len(nats)
        cost = cost_of(mean)
        match self.coverage:
            case "seed":
                return -cost * cover
            case "divide":
                return -cost / cover
            case "pad":
                covered = nats[: min(written, wanted)]
                price = math.log(self.scorer.vocabulary_size) if self.missing_nats is None else self.missing_nats
                padded = (math.fsum(covered) + (wanted - len(covered)) * max(price, mean)) / wanted
                return -cost_of(padded)
            case "additive":
                return -cost - self.coverage_weight * (1 - cover)
        return cover * math.exp(-mean)  # coverage=prob


def _exp(nats: float) -> float:
    """exp, kept finite: a reward must not be infinite."""
    return math.exp(min(nats, 80.0))
