"""Load an export again from disk and compare with the model in memory: weights, tokenizer, logits, greedy answers."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import transformers
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin

from selfdistill.models.export import ExportError, Tell
from selfdistill.models.generation import completion_logits, generate, tokenize
from selfdistill.models.structure import evaluating, inner_model
from selfdistill.rollout import Prompt

log = logging.getLogger(__name__)

VERIFICATION = "verification.json"
ANSWER_TOKENS = 32
POSITIONS = 64  # compared in each sequence; the float32 logits of all of them are held at once
MAX_PROMPTS = 8
DEFAULT_PROMPTS = ("What is the capital of France?", "Write one sentence about the sea.", "add 12 and 30")


@dataclass(frozen=True)
class Tolerance:
    """What rounding may do to the answers.

    Attributes:
        logprob_difference: largest difference of the log-probability of a token of the greedy answers, in nats.
        mean_kl: KL(in memory ‖ written) in nats, mean over the compared positions.
        relative_logit_difference: largest absolute difference of a logit, as a fraction of the largest absolute logit.
    """

    logprob_difference: float
    mean_kl: float
    relative_logit_difference: float


# By the coarser of the two dtypes. float32: the order of additions is all that differs. float16 keeps 11 bits of each
# weight and activation, bfloat16 8, so their rounding is 0.0005 and 0.004 of a value, and it adds up over the layers.
# Seen on the embedded model (4 layers, from float32): mean KL 5e-6 and 4e-4, logits 0.0016 and 0.013 of the largest;
# the limits leave room for deeper models. That the weights are the right ones is checked exactly, apart from this.
TOLERANCES = {
    "bfloat16": Tolerance(1.0, 2e-2, 0.2),
    "float16": Tolerance(0.2, 2e-3, 0.05),
    "float32": Tolerance(1e-3, 1e-6, 1e-4),
}

# nf4 rounds each weight to one of sixteen values: about a tenth of its size.
FOUR_BIT = Tolerance(3.0, 0.5, 0.5)


@dataclass(frozen=True)
class Scores:
    """What a model says of the last POSITIONS tokens of each sequence, one sequence after the other.

    Tokens of the prompt count too, since a model may answer with its end token alone.

    Attributes:
        logps: log-probabilities (N,) of the tokens; NaN where the program doesn't tell.
        likeliest: the token ids (N,) that it would have chosen.
        logits: float32 (N, V) on the CPU; None where the program doesn't give them.
    """

    logps: Float[Tensor, " N"]
    likeliest: Int[Tensor, " N"]
    logits: Float[Tensor, "N V"] | None = None


@runtime_checkable
class AnsweringModel(Protocol):
    """A model that can be asked: the one in memory, or an export as the program that its users will use has loaded it.

    A format whose consumer is not transformers brings a class of its own.
    """

    @property
    def dtype(self) -> str:
        """Of the weights, such as "bfloat16"."""

    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt's token ids, through the chat template where it has messages."""

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""

    def answers(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Greedy answers of ANSWER_TOKENS at most, with the end token where one was emitted."""

    def scores(self, sequences: list[list[int]]) -> Scores:
        """What the model says of each sequence's last POSITIONS tokens."""


@dataclass(frozen=True)
class TransformersModel(AnsweringModel):
    """A model of transformers, with or without PEFT's adapter, and its tokenizer.

    Attributes:
        chat_template_kwargs: arguments of the chat template that it was trained with.
        tell: gets a line for each part of a longer work.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tell: Tell = field(default=lambda line: None)

    @property
    def base(self) -> PreTrainedModel:
        return inner_model(self.model)

    @property
    def has_adapter(self) -> bool:
        return isinstance(self.model, PeftModel)

    @property
    def quantization(self) -> QuantizationConfigMixin | None:
        return getattr(self.base.config, "quantization_config", None)

    @property
    def dtype(self) -> str:
        return str(self.base.dtype).removeprefix("torch.")

    def encode(self, prompt: Prompt) -> list[int]:
        return tokenize(prompt, self.tokenizer, self.chat_template_kwargs)

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))

    def answers(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        return generate(self.model, prompt_ids, tokenizer=self.tokenizer, max_new_tokens=ANSWER_TOKENS)

    def scores(self, sequences: list[list[int]]) -> Scores:
        # One sequence at a time, so that there is no padding.
        tails = [ids[-min(POSITIONS, len(ids) - 1) :] for ids in sequences]
        with evaluating(self.model):
            found = [
                completion_logits(self.model, ids[: -len(tail)], tail).cpu()
                for ids, tail in zip(sequences, tails, strict=True)
            ]
        logps = [
            logits.log_softmax(-1)[torch.arange(len(tail)), tail] for logits, tail in zip(found, tails, strict=True)
        ]
        logits = torch.cat(found)
        return Scores(torch.cat(logps), logits.argmax(-1), logits)


def load(where: str | Path, trained: TransformersModel, **options: Any) -> PreTrainedModel:
    """A model of the same kind as the trained one, from this machine alone."""
    return AutoModelForCausalLM.from_pretrained(
        where,
        attn_implementation=trained.base.config._attn_implementation,
        trust_remote_code=type(trained.base).__module__.startswith("transformers_modules"),
        local_files_only=True,
        **options,
    )


def load_written(folder: Path, trained: TransformersModel, **options: Any) -> PreTrainedModel:
    """The whole model that lies in a folder, on the device of the trained one where both fit, otherwise on the CPU."""
    size_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return load(folder, trained, device_map={"": roomy_device(trained.base.device, size_bytes)}, **options)


def loaded(model: PreTrainedModel | PeftModel, folder: Path, trained: TransformersModel) -> TransformersModel:
    """A model that was loaded from `folder`, with the tokenizer that lies there, asked as the trained one is."""
    return replace(trained, model=model, tokenizer=AutoTokenizer.from_pretrained(folder))


def roomy_device(device: torch.device, needed_bytes: int) -> torch.device:
    """The device itself where so much fits beside what is there, otherwise the CPU."""
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 1.2 * needed_bytes + 2**30:
        return torch.device("cpu")
    return device


def same_tensors(ours: Iterable[tuple[str, Tensor]], theirs: Mapping[str, Tensor]) -> bool:
    """Whether both have the same names, and under each name the same values, ours rounded to their dtype."""
    left = dict(theirs)
    for name, tensor in ours:
        other = left.pop(name, None)
        if other is None or not torch.equal(tensor.cpu(), other.to("cpu", tensor.dtype)):
            return False
    return not left


@dataclass(frozen=True)
class Verification:
    """What `verification.json` holds.

    A greedy answer that differs is no reason by itself: near ties occur in 16 bit, and a token can only lose a lead of
    at most twice the largest difference, which has a limit of its own.

    Attributes:
        consumer: the program that loaded the export, with its version.
        weights_equal: each written weight equals, bit by bit, the one in memory (rounded to the written dtype); None
            where the format keeps them in a form that cannot be compared so.
        tokenizer_equal: the written tokenizer and chat template give the same ids for the prompts.
        prompts, tokens: how many were compared; of each prompt followed by the greedy answer of the model in memory,
            the last 64 tokens.
        greedy_equal: how many greedy answers agree to the last token.
        argmax_agreement: fraction of the tokens at which both find the same one likeliest.
        max_logprob_difference: of the tokens of the greedy answers, in nats.
        largest_margin_lost: where they disagree, by how many logits the token was ahead in memory, at most; 0 where
            they agree everywhere.
        max_logit_difference, largest_logit: absolute values over all compared positions; the former None where the
            program gives no logits.
        mean_kl: KL(in memory ‖ written), nats a token; None where the program gives no logits.
        training_kl: KL(in memory ‖ base), nats a token: what the adapter does; None without adapter. Where it is
            smaller than `mean_kl`, rounding changes the model more than the training did.
        limit: of `max_logprob_difference`.
        tolerance: of the others, where they are known.
        dtype_in_memory, dtype_written: of the base's and the export's weights.
        notes: what else was compared, in sentences.
    """

    consumer: str
    weights_equal: bool | None
    tokenizer_equal: bool
    prompts: int
    tokens: int
    greedy_equal: int
    argmax_agreement: float
    max_logprob_difference: float
    largest_margin_lost: float
    max_logit_difference: float | None
    largest_logit: float
    mean_kl: float | None
    training_kl: float | None
    limit: float
    tolerance: Tolerance | None
    dtype_in_memory: str
    dtype_written: str
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """Either "equal", which is within the tolerance, or "differs"."""
        return "differs" if self.reasons else "equal"

    @property
    def reasons(self) -> list[str]:
        """What lies outside the tolerance, in words."""
        reasons = ["written weights differ from those in memory"] if self.weights_equal is False else []
        if not self.tokenizer_equal:
            reasons.append("the written tokenizer or chat template gives other ids")
        # The comparisons are written so that NaN fails them.
        if not self.max_logprob_difference <= self.limit:
            reasons.append(
                f"a token's log-probability differs by {self.max_logprob_difference:.3g}, allowed {self.limit:g}"
            )
        if self.tolerance is None or self.mean_kl is None or self.max_logit_difference is None:
            return reasons
        if not self.mean_kl <= self.tolerance.mean_kl:
            reasons.append(f"mean KL {self.mean_kl:.3g} nats a token, allowed {self.tolerance.mean_kl:g}")
        fraction = self.tolerance.relative_logit_difference
        if not self.max_logit_difference <= fraction * self.largest_logit:
            reasons.append(
                f"a logit differs by {self.max_logit_difference:.3g}, allowed {fraction:g} of the largest, "
                f"{self.largest_logit:.3g}"
            )
        return reasons

    def sentences(self) -> list[str]:
        """The outcome, for the export's page."""
        return [
            f"Loaded again with {self.consumer} and compared with the trained model: {self.greedy_equal} of "
            f"{self.prompts} greedy answers are the same, and the log-probability of their tokens differs by "
            f"{self.max_logprob_difference:.2g} at most (allowed: {self.limit:g}). All numbers: `{VERIFICATION}`.",
            *self.notes,
        ]


def compare(
    trained: TransformersModel,
    written: AnsweringModel,
    folder: Path,
    prompts: Sequence[Prompt] = (),
    *,
    weights_equal: bool | None,
    consumer: str = f"transformers {transformers.__version__}",
    tolerance: Tolerance | None = None,
    limit: float | None = None,
    notes: Sequence[str] = (),
) -> Verification:
    """Compare what was loaded from `folder` with the model in memory; the folder's verification.json gets the outcome.

    Args:
        prompts: the first eight are used; without any, three general ones.
        weights_equal: whether the format found the weights equal (`same_tensors`); None where it cannot tell.
        consumer: the program that loaded it, with its version.
        tolerance: of a format that rounds more than 16 bit do; otherwise the one of the coarser dtype.
        limit: of the largest difference of a log-probability, instead of the tolerance's.
        notes: sentences for the page.

    Raises:
        ExportError: outside the tolerance. The folder stays, for inspection.
    """
    ids = [trained.encode(prompt) for prompt in compared_prompts(trained, prompts)]
    answers = trained.answers(ids)
    sequences = [prompt + answer for prompt, answer in zip(ids, answers, strict=True)]
    expected, found = trained.scores(sequences), written.scores(sequences)
    assert expected.logits is not None
    training_kl = None
    if isinstance(trained.model, PeftModel):
        with trained.model.disable_adapter():
            untrained = trained.scores(sequences).logits
            training_kl = None if untrained is None else _mean_kl(expected.logits, untrained)
    same = expected.likeliest == found.likeliest
    leading = expected.logits.topk(2, dim=-1).values
    dtypes = trained.dtype, written.dtype
    if tolerance is None:
        tolerance = next(limits for dtype, limits in TOLERANCES.items() if dtype in dtypes)
    result = Verification(
        consumer=consumer,
        weights_equal=weights_equal,
        tokenizer_equal=all(
            own == written.encode(prompt) and trained.decode(own) == written.decode(own)
            for own, prompt in zip(ids, compared_prompts(trained, prompts), strict=True)
        ),
        prompts=len(ids),
        tokens=len(same),
        greedy_equal=sum(a == b for a, b in zip(answers, written.answers(ids), strict=True)),
        argmax_agreement=float(same.float().mean()),
        max_logprob_difference=_largest_in_answers(expected.logps - found.logps, sequences, answers),
        largest_margin_lost=float((leading[:, 0] - leading[:, 1]).masked_fill(same, 0.0).max()),
        max_logit_difference=None if found.logits is None else float((expected.logits - found.logits).abs().max()),
        largest_logit=float(expected.logits.abs().max()),
        mean_kl=None if found.logits is None else _mean_kl(expected.logits, found.logits),
        training_kl=training_kl,
        limit=limit or tolerance.logprob_difference,
        tolerance=tolerance,
        dtype_in_memory=trained.dtype,
        dtype_written=written.dtype,
        notes=tuple(notes),
    )
    outcome = {"verdict": result.verdict, "reasons": result.reasons} | asdict(result)
    (folder / VERIFICATION).write_text(json.dumps(outcome, indent=2) + "\n")
    if result.reasons:
        raise ExportError(
            f"The export in {folder} does not answer as the trained model does: {'; '.join(result.reasons)}. "
            f"The numbers are in its {VERIFICATION}."
        )
    if training_kl is not None and result.mean_kl is not None and result.mean_kl > training_kl:
        log.warning(
            f"Rounding to {result.dtype_written} changes the answers by {result.mean_kl:.2g} nats a token, "
            f"training by {training_kl:.2g}: the export keeps little of it."
        )
    return result


@dataclass(frozen=True)
class Likeness:
    """How alike two models answer; see `Verification` for the fields."""

    prompts: int
    greedy_equal: int
    max_logprob_difference: float


def answers_alike(trained: TransformersModel, written: AnsweringModel, prompts: Sequence[Prompt]) -> Likeness:
    """Greedy answers to the prompts, and the log-probabilities of their tokens, of both models."""
    ids = [trained.encode(prompt) for prompt in compared_prompts(trained, prompts)]
    answers = trained.answers(ids)
    sequences = [prompt + answer for prompt, answer in zip(ids, answers, strict=True)]
    differences = trained.scores(sequences).logps - written.scores(sequences).logps
    greedy_equal = sum(a == b for a, b in zip(answers, written.answers(ids), strict=True))
    return Likeness(len(ids), greedy_equal, _largest_in_answers(differences, sequences, answers))


def compared_prompts(trained: TransformersModel, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first eight of these prompts; without any, three general ones."""
    if prompts:
        return list(prompts[:MAX_PROMPTS])
    chat = trained.tokenizer.chat_template
    return [[{"role": "user", "content": text}] if chat else text for text in DEFAULT_PROMPTS]


def _largest_in_answers(
    differences: Float[Tensor, " N"], sequences: Sequence[list[int]], answers: Sequence[list[int]]
) -> float:
    """The largest absolute difference of the answers' tokens, which are the last of each sequence's compared ones."""
    pieces = differences.abs().split([min(POSITIONS, len(ids) - 1) for ids in sequences])
    of_answers = torch.cat([piece[-len(answer) :] for piece, answer in zip(pieces, answers, strict=True) if answer])
    told = of_answers[~of_answers.isnan()] if len(of_answers) > of_answers.isnan().sum() else of_answers
    return float(told.max())


def _mean_kl(p_logits: Float[Tensor, "N V"], q_logits: Float[Tensor, "N V"]) -> float:
    total = 0.0
    for p, q in zip(
        p_logits.split(POSITIONS), q_logits.split(POSITIONS), strict=True
    ):  # in float64, so a few at a time
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += float(kl_div(log_q, log_p, reduction="sum", log_target=True))
    return total / len(p_logits)
