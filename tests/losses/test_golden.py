"""Against the published implementations' own outputs, float64, rtol 1e-9."""

import pytest
import torch
from torch import Tensor

from selfdistill.losses import (
    aggregate,
    chunked_token_divergence,
    importance_weight,
    mix_logits,
    sampled_token_loss,
    token_divergence,
)
from tests.reference import golden

TAIL = {"topk_tail": True, "topk_renorm": False}
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def names(file: str) -> list[str]:
    return sorted(golden(file)[0])


def load(file: str, case: str) -> tuple[dict, dict[str, Tensor]]:
    cases, arrays = golden(file)
    own = {key.split("/")[1]: torch.from_numpy(array) for key, array in arrays.items() if key.startswith(f"{case}/")}
    own["in_student_logits"].requires_grad_()
    return cases[case], own


def logps_of(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits / temperature, -1).gather(-1, ids[..., None]).squeeze(-1)


def per_token(case: dict, x: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The divergence of a case, materialised, and checked to be the same from hidden states."""
    student, teacher = x["in_student_logits"], x["in_teacher_logits"]
    temperature = case.get("temperature", 1.0)
    if case["mode"].startswith("sampled"):
        return sampled_token_loss(logps_of(student, ids, temperature), logps_of(teacher, ids, temperature))
    options = {"alpha": case["alpha"], "top_k": case["topk"], "temperature": temperature}
    options["tail"] = TAIL.get(case["mode"], True)
    values = token_divergence(student, teacher, **options)
    identity = torch.eye(case["V"], dtype=student.dtype)
    flat = chunked_token_divergence(
        student.detach().flatten(0, 1), teacher.flatten(0, 1), identity, identity, **options, chunk_tokens=4
    )
    torch.testing.assert_close(flat, values.detach().flatten(), **CLOSE)
    return values


@pytest.mark.parametrize("name", names("sdpo_loss"))
def test_sdpo(name):
    case, x = load("sdpo_loss", name)
    ids = x["in_response_ids"]
    values = per_token(case, x, ids)
    if case["is_clip"] is not None:
        student = logps_of(x["in_student_logits"], ids, case["temperature"])
        values = values * importance_weight(student, x["in_old_log_probs"], case["is_clip"])
    if "in_rollout_is_weights" in x:
        values = values * x["in_rollout_is_weights"]
    torch.testing.assert_close(values, x["out_per_token"], **CLOSE)

    mask = x["in_response_mask"]
    active = x.get("in_self_distillation_mask")
    mode = case["loss_agg_mode"].replace("-", "_")
    if mode == "seq_mean_token_mean":
        # The reference divides each row by its length plus 1e-8, which shows at this tolerance.
        length = x["out_loss_mask"].sum(-1, keepdim=True)
        values = values * length / (length + 1e-8)
    loss = aggregate(values, mask, mode, row_active=active, count_inactive_rows=False)
    torch.testing.assert_close(loss, x["out_loss"], **CLOSE)
    (gradient,) = torch.autograd.grad(loss, x["in_student_logits"])
    torch.testing.assert_close(gradient, x["grad_student_logits"], **CLOSE)


@pytest.mark.parametrize("name", names("self_distillation_loss"))
def test_trl(name):
    case, x = load("self_distillation_loss", name)
    ids = x["in_completion_ids"]
    values = per_token(case, x, ids)
    torch.testing.assert_close(values, x["out_per_token"], **CLOSE)
    if case["is_clip"] is not None:
        student = logps_of(x["in_student_logits"], ids, 1.0)
        values = values * importance_weight(student, x["in_old_per_token_logps"], case["is_clip"])
    torch.testing.assert_close(values, x["out_per_token_after_is"], **CLOSE)

    mask = x["in_completion_mask"].clone()
    mask[:, : case["num_loss_tokens_to_skip"]] = 0
    loss = aggregate(values, mask, "seq_mean_token_mean", row_active=x.get("in_self_distillation_mask"))
    torch.testing.assert_close(loss, x["out_trainer_loss"], **CLOSE)
    (gradient,) = torch.autograd.grad(loss, x["in_student_logits"])
    torch.testing.assert_close(gradient, x["grad_student_logits"], **CLOSE)


def test_trust_region_mixture():
    cases, arrays = golden("teacher_updates")
    (name,) = [name for name in cases if name.startswith("trust_region")]
    ref, student, out = (
        torch.from_numpy(arrays[f"{name}/{k}"]) for k in ("in_ref_logits", "in_student_logits", "out_logits")
    )
    mixed = mix_logits(ref, student, cases[name]["mix_coef"])
    torch.testing.assert_close(mixed.log_softmax(-1), out.log_softmax(-1), rtol=2e-5, atol=1e-6)
