"""Teachers' weights by themselves, without a training run."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from selfdistill.errors import UserError
from selfdistill.losses import mix_logits
from selfdistill.teachers.weights import Base, Copy, Ema, Live, Model, TrustRegion, trainable
from tests.reference import golden
from tests.tiny import tiny_model, tiny_tokenizer


class Vector(nn.Module):
    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values.clone())


def adapted(trained: bool = True) -> Any:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(), config)
    if trained:
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p)
    return model


def walk(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in trainable(model).values():
        p.data.add_(torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.dtype) * 0.1)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(4, 12)[None]).logits


@pytest.mark.parametrize("rate", [0.01, 0.05, 1.0])
def test_average_has_its_closed_form(rate: float) -> None:
    """theta_T(n) = (1 - rate)^n theta(0) + rate * sum over k of (1 - rate)^(n - k) theta(k)."""
    model, teacher = Vector(torch.randn(50, generator=torch.Generator().manual_seed(0))), Ema(rate)
    teacher.attach(model)
    states = [model.values.detach().double().clone()]
    for step in range(1, 21):
        walk(model, step)
        states.append(model.values.detach().double().clone())
        teacher.update(step)
    n = len(states) - 1
    expected = (1 - rate) ** n * states[0] + rate * sum((1 - rate) ** (n - k) * states[k] for k in range(1, n + 1))
    torch.testing.assert_close(teacher.shadow["values"].double(), expected, rtol=1e-5, atol=1e-6)


def test_average_of_a_bfloat16_student_is_float32() -> None:
    """At rate 0.01 and steps of 1e-5 of the weights an average in bfloat16 would move a third of the way."""
    model, teacher = Vector(torch.full((64,), 1.0)).to(torch.bfloat16), Ema(0.01)
    teacher.attach(model)
    expected = torch.ones(64, dtype=torch.float64)
    for step in range(200):
        model.values.data.add_(0.01 if step % 20 == 0 else 0.0)
        expected = 0.99 * expected + 0.01 * model.values.detach().double()
        teacher.update(step + 1)
    shadow = teacher.shadow["values"]
    assert shadow.dtype == torch.float32
    torch.testing.assert_close(shadow.double(), expected, rtol=1e-6, atol=0)
    with teacher.exchanged():
        assert model.values.dtype == torch.bfloat16


@pytest.mark.parametrize("case", ["ema_float32_0.05", "ema_float32_0.01"])
def test_average_equals_the_reference_values(case: str) -> None:
    cases, arrays = golden("teacher_updates")
    model, teacher = Vector(torch.tensor(arrays[f"{case}/in_init"])), Ema(cases[case]["rate"])
    teacher.attach(model)
    for step, state in enumerate(arrays[f"{case}/in_student_traj"], start=1):
        model.values.data = torch.tensor(state)
        teacher.update(step)
    for published in ("trl", "lasgroup"):
        expected = torch.tensor(arrays[f"{case}/out_{published}"])
        torch.testing.assert_close(teacher.shadow["values"], expected, rtol=2e-5, atol=1e-7)


def test_bfloat16_reference_trajectory_in_float32() -> None:
    """The published averages of a bfloat16 student are kept in bfloat16; ours is the exact one of the same students."""
    cases, arrays = golden("teacher_updates")
    case = "ema_bfloat16_0.01"
    model, teacher = Vector(torch.tensor(arrays[f"{case}/in_init"])), Ema(cases[case]["rate"])
    teacher.attach(model)
    exact = torch.tensor(arrays[f"{case}/in_init"]).double()
    for step, state in enumerate(arrays[f"{case}/in_student_traj"], start=1):
        model.values.data = torch.tensor(state)
        exact = 0.99 * exact + 0.01 * torch.tensor(state).double()
        teacher.update(step)
    torch.testing.assert_close(teacher.shadow["values"].double(), exact, rtol=1e-6, atol=1e-7)


def test_mixture_equals_the_reference_values() -> None:
    cases, arrays = golden("teacher_updates")
    case = "trust_region_0.3"
    reference, student = (torch.tensor(arrays[f"{case}/in_{who}_logits"]) for who in ("ref", "student"))
    mixed = mix_logits(reference, student, TrustRegion(cases[case]["mix_coef"]).mix_coef)
    expected = torch.tensor(arrays[f"{case}/out_logits"])
    torch.testing.assert_close(mixed.log_softmax(-1), expected.log_softmax(-1), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", [Base, Ema, Copy, TrustRegion, Live])
@pytest.mark.parametrize("adapter", [False, True])
def test_teacher_is_an_exact_copy_at_step_0(kind: Any, adapter: bool) -> None:
    """Also of a student that starts from a trained adapter."""
    model = adapted() if adapter else tiny_model()
    before, teacher = logits(model), kind()
    teacher.attach(model)
    for module in teacher.views():
        assert module is None
        torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("adapter", [False, True])
def test_views_run_the_teacher_and_give_the_student_back(adapter: bool) -> None:
    model = adapted() if adapter else tiny_model(tied=False)
    start, teacher = copy.deepcopy(model), Base()
    teacher.attach(model)
    walk(model, 0)
    moved = logits(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    for _ in teacher.views():
        torch.testing.assert_close(logits(model), logits(start), rtol=0, atol=0)
        assert not torch.equal(logits(model), moved)
    torch.testing.assert_close(logits(model), moved, rtol=0, atol=0)
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_student_comes_back_after_an_error() -> None:
    model, teacher = tiny_model(), Base()
    teacher.attach(model)
    walk(model, 0)
    moved = logits(model)
    with pytest.raises(RuntimeError, match="inside"), teacher.exchanged():
        raise RuntimeError("inside")
    torch.testing.assert_close(logits(model), moved, rtol=0, atol=0)


def test_fresh_adapter_at_its_start_is_the_base_model() -> None:
    model, teacher = adapted(trained=False), Base()
    with model.disable_adapter():
        base = logits(model)
    teacher.attach(model)
    walk(model, 0)
    assert not torch.equal(logits(model), base)
    for _ in teacher.views():
        torch.testing.assert_close(logits(model), base)


def test_copy_follows_every_so_many_steps() -> None:
    model, teacher = Vector(torch.zeros(2)), Copy(every=3)
    teacher.attach(model)
    seen = []
    for step in range(1, 8):
        model.values.data.fill_(step)
        teacher.update(step)
        seen.append(teacher.shadow["values"][0].item())
    assert seen == [0, 0, 3, 3, 3, 6, 6]


def test_mixture_runs_the_start_and_the_student() -> None:
    model, teacher = tiny_model(), TrustRegion(0.3)
    start = logits(model)
    teacher.attach(model)
    walk(model, 0)
    now = logits(model)
    passes = [logits(model) for _ in teacher.views()]
    torch.testing.assert_close(passes, [start, now], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Base, Ema, Copy, TrustRegion])
def test_state_goes_through_a_checkpoint(kind: Any) -> None:
    model, teacher, again = tiny_model(), kind(), kind()
    teacher.attach(model)
    walk(model, 0)
    teacher.update(10)
    saved = {name: t.clone() for name, t in teacher.state_dict().items()}
    again.attach(model)
    again.load_state_dict(saved)
    torch.testing.assert_close(dict(again.state_dict()), saved, rtol=0, atol=0)
    with pytest.raises(UserError, match="does not fit this model"):
        again.load_state_dict({"other": torch.zeros(1)})
    with pytest.raises(UserError, match="Live keeps none"):
        Live().load_state_dict(saved)


def test_another_model() -> None:
    student, other = tiny_model(0), tiny_model(1)
    teacher = Model(other, tokenizer=tiny_tokenizer())
    teacher.attach(student)
    teacher.check_vocabulary(tiny_tokenizer())
    assert list(teacher.views()) == [other]
    assert not any(p.requires_grad for p in other.parameters()) and not other.training
    assert teacher.state_dict() == {}


def test_another_vocabulary_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other, vocabulary = copy.copy(tiny_tokenizer()), {**tiny_tokenizer().get_vocab(), "a": 99_999}
    monkeypatch.setattr(other, "get_vocab", lambda: vocabulary)
    teacher = Model(tiny_model(1), tokenizer=other)
    teacher.attach(tiny_model(0))
    with pytest.raises(UserError, match=r"its vocabulary is not the student's .*'a' is 99999 there"):
        teacher.check_vocabulary(tiny_tokenizer())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Ema(0.0), r"outside \(0, 1\]"),
        (lambda: Ema(1.5), r"outside \(0, 1\]"),
        (lambda: Ema(0.1, cadence="epoch"), "write step or rollout"),
        (lambda: Copy(0), "at least 1"),
        (lambda: TrustRegion(1.5), r"outside \[0, 1\]"),
    ],
)
def test_settings_out_of_range(build: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()
