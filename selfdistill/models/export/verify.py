"""Load an export again from disk and compare with the model in memory: weights, tokenizer, logits, greedy answers."""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from selfdistill.models.export import ExportError
from selfdistill.models.export.folder import VERIFICATION
from selfdistill.models.export.merged_16bit import merged_tensors
from selfdistill.models.generation import base_model, completion_logits, generate, tokenize
from selfdistill.models.structure import evaluating
from selfdistill.rollout import Prompt

log = logging.getLogger(__name__)

POSITIONS = 64  # compared in each sequence; the float32 logits of all of them are held at once
DEFAULT_PROMPTS = ("What is the capital of France?", "Write one sentence about the sea.", "add 12 and 30")


@dataclass(frozen=True)
class Tolerance:
    """What rounding may do to the answers.

    Attributes:
        mean_kl: KL(in memory ‖ written) in nats, mean over the compared positions.
        relative_logit_difference: largest absolute difference of a logit, as a fraction of the largest absolute logit.
    """

    mean_kl: float
    relative_logit_difference: float


# By the coarser of the two dtypes. float32: the order of additions is all that differs. float16 keeps 11 bits of each
# weight and activation, bfloat16 8, so their rounding is 0.0005 and 0.004 of a value, and it adds up over the layers.
# Seen on the embedded model (4 layers, from float32): mean KL 5e-6 and 4e-4, logits 0.0016 and 0.013 of the largest;
# the limits leave room for deeper models. That the weights are the right ones is checked exactly, apart from this.
TOLERANCES = {
    torch.float32: Tolerance(mean_kl=1e-6, relative_logit_difference=1e-4),
    torch.float16: Tolerance(mean_kl=2e-3, relative_logit_difference=0.05),
    torch.bfloat16: Tolerance(mean_kl=2e-2, relative_logit_difference=0.2),
}


@dataclass(frozen=True)
class Verification:
    """What `verification.json` holds.

    A greedy answer that differs is no reason by itself: a token loses its lead only if that is at most twice the
    largest logit difference, which has its own limit; in 16 bit such near ties occur.

    Attributes:
        verdict: "equal" within the tolerance, or "differs".
        reasons: what lies outside the tolerance, in words.
        weights_equal: each written weight equals, bit by bit, the one in memory (rounded to the written dtype).
        tokenizer_equal: the written tokenizer and chat template give the same ids for the prompts.
        prompts, tokens: how many were compared; of each prompt followed by the greedy answer of the model in memory,
            the last 64 tokens.
        greedy_equal: greedy answers that agree to the last token.
        argmax_agreement: fraction of the tokens at which both find the same one likeliest.
        largest_margin_lost: where they don't, how far ahead the token was in memory, at most; logits. 0 without any.
        max_logit_difference, largest_logit: absolute values over all compared positions.
        mean_kl: KL(in memory ‖ written), nats a token.
        training_kl: KL(in memory ‖ base), nats a token: what the adapter does; None without adapter. Where it is
            smaller than `mean_kl`, rounding changes the model more than the training did.
        dtype_in_memory, dtype_written: of the base's and the export's weights.
    """

    verdict: str
    reasons: list[str]
    weights_equal: bool
    tokenizer_equal: bool
    prompts: int
    tokens: int
    greedy_equal: int
    argmax_agreement: float
    largest_margin_lost: float
    max_logit_difference: float
    largest_logit: float
    mean_kl: float
    training_kl: float | None
    tolerance: Tolerance
    dtype_in_memory: str
    dtype_written: str


def verify(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    prompts: Sequence[Prompt] = (),
    *,
    max_new_tokens: int = 32,
    max_prompts: int = 8,
) -> Verification:
    """Compare the export in `folder` with the model it was made from; the outcome also goes to its verification.json.

    Args:
        prompts: the first `max_prompts` are used; without any, three general ones.

    Raises:
        ExportError: outside the tolerance. The folder stays, for inspection.
    """
    folder = Path(folder)
    if not prompts:
        prompts = [[{"role": "user", "content": text}] if tokenizer.chat_template else text for text in DEFAULT_PROMPTS]
    prompts = list(prompts)[:max_prompts]
    written_tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenize(prompt, tokenizer) for prompt in prompts]
    tokenizer_equal = ids == [tokenize(prompt, written_tokenizer) for prompt in prompts] and all(
        tokenizer.decode(prompt_ids) == written_tokenizer.decode(prompt_ids) for prompt_ids in ids
    )
    settings = {"tokenizer": tokenizer, "max_new_tokens": max_new_tokens}
    answers = generate(model, ids, **settings)
    expected = _logits(model, ids, answers)
    training_kl = None
    if hasattr(model, "peft_config"):
        with model.disable_adapter():
            training_kl = _mean_kl(expected, _logits(model, ids, answers))
    written = load_export(folder, like=model)
    found = _logits(written, ids, answers)
    agreement = [e.argmax(-1) == f.argmax(-1) for e, f in zip(expected, found, strict=True)]
    margins = [_margin(e)[~same] for e, same in zip(expected, agreement, strict=True)]
    written_answers = generate(written, ids, **settings)
    dtypes = [base_model(model).dtype, base_model(written).dtype]
    tolerance = next(TOLERANCES[dtype] for dtype in (torch.bfloat16, torch.float16, torch.float32) if dtype in dtypes)
    numbers: dict[str, Any] = {
        "weights_equal": _weights_equal(model, written),
        "tokenizer_equal": tokenizer_equal,
        "max_logit_difference": max(float((e - f).abs().max()) for e, f in zip(expected, found, strict=True)),
        "largest_logit": max(float(e.abs().max()) for e in expected),
        "mean_kl": _mean_kl(expected, found),
        "training_kl": training_kl,
    }
    reasons = _reasons(tolerance, **numbers)
    result = Verification(
        verdict="differs" if reasons else "equal",
        reasons=reasons,
        prompts=len(prompts),
        tokens=sum(len(logits) for logits in expected),
        greedy_equal=sum(a == b for a, b in zip(answers, written_answers, strict=True)),
        argmax_agreement=float(torch.cat(agreement).float().mean()),
        largest_margin_lost=max((float(margin.max()) for margin in margins if len(margin)), default=0.0),
        tolerance=tolerance,
        dtype_in_memory=str(dtypes[0]).removeprefix("torch."),
        dtype_written=str(dtypes[1]).removeprefix("torch."),
        **numbers,
    )
    (folder / VERIFICATION).write_text(json.dumps(asdict(result), indent=2) + "\n")
    if reasons:
        raise ExportError(
            f"The export in {folder} does not answer as the trained model does: {'; '.join(reasons)}. "
            f"The numbers are in its {VERIFICATION}."
        )
    if training_kl is not None and result.mean_kl > training_kl:
        log.warning(
            "Rounding to %s changes the answers by %.2g nats a token, training by %.2g: the export keeps little of it.",
            result.dtype_written, result.mean_kl, training_kl,
        )  # fmt: skip
    return result


def load_export(folder: Path, *, like: Any) -> Any:
    """The export as a user would load it; an adapter on its base, loaded from where adapter_config.json says.

    Args:
        like: the model in memory, for the dtype, quantisation and attention of the base, and the device.
    """
    base = base_model(like)
    options: dict[str, Any] = {
        "attn_implementation": base.config._attn_implementation,
        "trust_remote_code": type(base).__module__.startswith("transformers_modules"),
        "local_files_only": True,
    }
    adapter_config = folder / "adapter_config.json"
    if not adapter_config.is_file():
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=_device(folder, like), **options)
        return loaded.eval()
    config = json.loads(adapter_config.read_text())
    quantization = getattr(base.config, "quantization_config", None)
    if quantization is not None:
        options["quantization_config"] = quantization
    loaded = AutoModelForCausalLM.from_pretrained(
        config["base_model_name_or_path"],
        revision=config.get("revision") or "main",
        dtype=base.dtype,
        device_map={"": base.device},
        **options,
    )
    return PeftModel.from_pretrained(loaded, folder).eval()


def _device(folder: Path, like: Any) -> dict[str, torch.device]:
    """The device of the model in memory where a second one fits beside it, otherwise the CPU."""
    device = base_model(like).device
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 1.2 * size + 2**30:
        device = torch.device("cpu")
    return {"": device}


def _logits(model: Any, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list[Float[Tensor, "_ V"]]:
    """Logits of the last positions of each prompt with its completion, float32 on the CPU.

    The prompt's end counts too, since a model may answer with its end token alone. One sequence at a time: no padding.
    """
    sequences = [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
    kept = [min(POSITIONS, len(ids) - 1) for ids in sequences]
    with evaluating(model):
        return [
            completion_logits(model, ids[:-count], ids[-count:]).cpu()
            for ids, count in zip(sequences, kept, strict=True)
        ]


def _mean_kl(p_logits: list[Float[Tensor, "_ V"]], q_logits: list[Float[Tensor, "_ V"]]) -> float:
    total = 0.0
    for p, q in zip(p_logits, q_logits, strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / sum(len(p) for p in p_logits)


def _margin(logits: Float[Tensor, "T V"]) -> Float[Tensor, " T"]:
    best = logits.topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


def _weights_equal(model: Any, written: Any) -> bool:
    ours: Iterable[tuple[str, Tensor]]
    if hasattr(written, "peft_config"):
        adapter = model.active_adapter
        ours = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False).items()
        theirs = get_peft_model_state_dict(written, save_embedding_layers=False)
    else:
        ours, theirs = merged_tensors(model, written.dtype), written.state_dict()
    left = dict(theirs)
    for name, tensor in ours:
        other = left.pop(name, None)
        if other is None or not torch.equal(tensor.cpu(), other.to("cpu", tensor.dtype)):
            return False
    return not left


def _reasons(
    tolerance: Tolerance,
    *,
    weights_equal: bool,
    tokenizer_equal: bool,
    max_logit_difference: float,
    largest_logit: float,
    mean_kl: float,
    training_kl: float | None,
) -> list[str]:
    reasons = [] if weights_equal else ["written weights differ from those in memory"]
    if not tokenizer_equal:
        reasons.append("the written tokenizer or chat template gives other ids")
    # Written so that NaN fails.
    if not mean_kl <= tolerance.mean_kl:
        reasons.append(f"mean KL {mean_kl:.3g} nats a token, allowed {tolerance.mean_kl:g}")
    if not max_logit_difference <= tolerance.relative_logit_difference * largest_logit:
        reasons.append(
            f"a logit differs by {max_logit_difference:.3g}, allowed "
            f"{tolerance.relative_logit_difference:g} of the largest, {largest_logit:.3g}"
        )
    return reasons
