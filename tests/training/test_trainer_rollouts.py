"""Who writes the completions, who judges them, and how the judgement reaches teacher and policy gradient."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl import GRPOConfig

from selfdistill import Distillation, RolloutSource, Teacher, UserError
from selfdistill.teachers.context import Feedback
from selfdistill.teachers.weights import Ema, Model, TrustRegion
from tests.tiny import tiny_tokenizer
from tests.training.naive import (
    Hint,
    assert_same_parameters,
    by_length,
    completion_logps,
    frozen,
    lively,
    logged,
    lora,
    make,
    passes,
    sgd,
)


def told(completions: list, **_: Any) -> list[dict]:
    return [
        {"score": float(i % 4 == 0), "feedback": f"number {i}: {len(c[0]['content'])}"}
        for i, c in enumerate(completions)
    ]


def test_feedback_reaches_the_teacher_of_that_very_rollout(tmp_path: Path) -> None:
    context = Feedback(use_solution=False)
    trainer, batches = make(tmp_path, lively(), {"max_steps": 1}, teacher=Teacher(Ema(), context), reward_funcs=told)
    trainer.train()
    (batch,) = batches
    for i, shown in enumerate(batch.shown):
        if i % 4 == 0:
            assert shown is None
        else:
            assert f"number {i}:" in tiny_tokenizer().decode(shown)
    assert batch.scores == [1.0, 0.0, 0.0, 0.0] * 2


def test_routed_failures_leave_successes_to_the_policy_gradient(tmp_path: Path) -> None:
    settings = Distillation(route="failures", policy_weight=1.0, success_threshold=1.0)
    trainer, batches = make(
        tmp_path, lively(), {"max_steps": 1}, teacher=Teacher(context=Hint(lambda i: i != 1)), distillation=settings,
        reward_funcs=told,
    )  # fmt: skip
    trainer.train()
    advantages = batches[0].advantages.tolist()
    assert all(a == 0 for i, a in enumerate(advantages) if i % 4 != 0 and i != 1)
    # Successes, and failures that the teacher has nothing to say about.
    assert all(abs(advantages[i]) > 0.1 for i in (0, 1, 4))
    assert logged(trainer, "distill/active_fraction") == [5 / 8]


def test_signal_as_an_advantage(tmp_path: Path) -> None:
    """advantages = policy_weight * A + weight * (log q - log pi) of the sampled tokens; no divergence is computed."""
    start, other = lively(), lively(5)
    settings = Distillation(alpha=1.0, signal="advantage", weight=0.25, policy_weight=0.5)
    trainer, batches = make(
        tmp_path, frozen(start), {"max_steps": 1}, teacher=Teacher(Model(frozen(other)), Hint()), distillation=settings,
        reward_funcs=by_length,
    )  # fmt: skip
    with passes(trainer.model) as seen:
        trainer.train()
    (batch,) = batches
    scores = torch.tensor(batch.scores).view(-1, 4)
    group = ((scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)).flatten()
    for i, completion in enumerate(batch.completions):
        tokens = torch.tensor(completion)[:, None]
        expected = 0.5 * group[i].double().expand(len(completion)).clone()
        if batch.shown[i] is not None:
            ours = completion_logps(start, batch.prompts[i], completion, 1.0).gather(1, tokens)[:, 0]
            theirs = completion_logps(other, batch.shown[i], completion, 1.0).gather(1, tokens)[:, 0]
            expected += 0.25 * (theirs - ours)
        torch.testing.assert_close(
            batch.advantages[i][: len(completion)].double(), expected.detach(), rtol=1e-4, atol=1e-4
        )
    assert sum(p.gradient for p in seen) == 2
    assert logged(trainer, "grad_norm")[0] > 0


def test_no_signal_is_no_advantage(tmp_path: Path) -> None:
    """Early in a run a whole batch may be without a success that the teacher could be shown."""
    settings = Distillation(signal="advantage", policy_weight=0.5)
    trainer, batches = make(
        tmp_path, lively(), {"max_steps": 1}, teacher=Teacher(context=Feedback()), distillation=settings,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
    )  # fmt: skip
    trainer.train()
    assert not batches[0].advantages.any()
    assert logged(trainer, "distill/active_fraction") == [0.0]


def test_one_completion_per_prompt_without_a_reward(tmp_path: Path) -> None:
    args = {"num_generations": 1, "max_steps": 1}
    trainer, batches = make(tmp_path, lively(), args, teacher=Teacher(context=Hint(lambda i: True)))
    trainer.train()
    assert len({tuple(p) for p in batches[0].prompts}) == 8
    assert logged(trainer, "grad_norm")[0] > 0
    with pytest.raises(ValueError, match="at least 2 generations"):
        GRPOConfig(output_dir=str(tmp_path), num_generations=1, use_cpu=True, bf16=False)


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_off_policy_rows(fraction: float, tmp_path: Path) -> None:
    """Whole groups take their demonstration, the same ones every time, and their cross-entropy is what is learned."""
    source = RolloutSource(on_policy_fraction=fraction, cross_entropy_weight=2.0)
    start, taken = lively(), []
    for _ in range(2):
        trainer, batches = make(tmp_path, frozen(start), {"max_steps": 1, "num_generations": 2}, rollout=source)
        trainer.train()
        demonstrated = trainer._rollouts.demonstrated
        taken.append(demonstrated)
    assert taken[0] == taken[1] and taken[0][::2] == taken[0][1::2]
    assert sum(demonstrated) == 8 if fraction == 0 else 0 < sum(demonstrated) < 8
    (batch,) = batches
    for i in range(8):
        text = tiny_tokenizer().decode(batch.completions[i])
        assert demonstrated[i] == (text in [f"{'abcd'[:k]}{tiny_tokenizer().eos_token}" for k in range(1, 5)])
    student = frozen(start)
    loss = _cross_entropy(student, batch, demonstrated)
    assert logged(trainer, "loss")[0] == pytest.approx(loss.item(), rel=1e-4)
    sgd(student, loss, 0.05)
    assert_same_parameters(trainer.model, student, start, rtol=1e-5)


def test_a_demonstration_beyond_the_limit_is_cut_without_an_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = RolloutSource(on_policy_fraction=0.0, cross_entropy_weight=1.0)
    args = {"max_steps": 1, "num_generations": 2, "max_completion_length": 3}
    trainer, batches = make(tmp_path, args=args, rollout=source)
    trainer.train()
    (batch,) = batches
    end = trainer._tokenizer.eos_token_id
    assert all(len(ids) <= 3 for ids in batch.completions)
    whole = [len(ids) < 3 or tiny_tokenizer().decode(ids[:2]) == "ab" and ids[2] == end for ids in batch.completions]
    assert [ids[-1] == end for ids in batch.completions] == whole
    assert not all(whole)
    assert re.search(r"golden_response has [45] tokens and is cut at rollout\.max_completion_tokens=3", caplog.text)


def _cross_entropy(student: Any, batch: Any, demonstrated: list[bool]) -> torch.Tensor:
    rows = [i for i in range(8) if demonstrated[i]]
    logps = [
        completion_logps(student, batch.prompts[i], batch.completions[i], 1.0).gather(
            1, torch.tensor(batch.completions[i])[:, None]
        )
        for i in rows
    ]
    return -2.0 * torch.cat(logps).mean() * len(rows) / 8


def test_demonstrations_and_teacher_share_one_pass(tmp_path: Path) -> None:
    source = RolloutSource(on_policy_fraction=0.5, cross_entropy_weight=1.0)
    trainer, _ = make(
        tmp_path, lively(), {"max_steps": 1}, rollout=source, teacher=Teacher(context=Hint(lambda i: True))
    )
    with passes(trainer.model) as seen:
        trainer.train()
    assert sum(p.gradient for p in seen) == 2


def test_rollouts_from_the_teacher(tmp_path: Path) -> None:
    """They answer the teacher's prompt under the teacher's weights; rows without a signal answer their own."""
    start = lively()
    shifted = Ema(0.5)
    trainer, batches = make(
        tmp_path, frozen(start), {"max_steps": 1, "temperature": 1e-3}, teacher=Teacher(shifted, Hint()),
        rollout=RolloutSource(from_teacher=True),
    )  # fmt: skip
    other = lively(5)
    shifted.shadow = {n: p.detach().float() for n, p in other.named_parameters()}
    shifted.rate = 1e-9
    trainer.train()
    (batch,) = batches
    for i, completion in enumerate(batch.completions):
        asked = batch.shown[i] or batch.prompts[i]
        assert completion_logps(other, asked, completion, 1.0).argmax(1).tolist() == completion
    torch.testing.assert_close(shifted.shadow["model.norm.weight"], other.model.norm.weight.float())


@pytest.mark.parametrize("weights", [TrustRegion(), Model("embedded")])
def test_teachers_that_cannot_sample_are_refused(weights: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="from_teacher"):
        make(tmp_path, lively(), teacher=Teacher(weights, Hint()), rollout=RolloutSource(from_teacher=True))


class NeedsPolicy:
    """A reward that takes the policy's log-probabilities where there are any."""

    def __init__(self) -> None:
        self.given: list[Any] = []
        self.prompts: list[Any] = []

    def bind(self, scorer: Any) -> None:
        self.scorer = scorer

    def __call__(self, completion_ids: list, prompt_ids: list, policy_logprobs: Any = None, **_: Any) -> list[float]:
        scored = policy_logprobs or self.scorer.token_logprobs(prompt_ids, completion_ids)
        self.given.append(policy_logprobs)
        self.prompts.append(prompt_ids)
        return [float(row.mean()) for row in scored]


@pytest.mark.parametrize(
    ("args", "known"),
    [
        ({}, False),
        ({"num_iterations": 2}, True),
        ({"steps_per_generation": 4}, True),
        ({"num_iterations": 2, "temperature": 0.8}, False),
        ({"num_iterations": 2, "mask_truncated_completions": True}, False),
    ],
)
def test_log_probabilities_that_trl_has_are_used(args: dict, known: bool, tmp_path: Path) -> None:
    reward = NeedsPolicy()
    start = lively()
    trainer, batches = make(tmp_path, frozen(start), {"max_steps": 1, **args}, reward_funcs=reward)
    with passes(trainer.model) as seen:
        trainer.train()
    assert (reward.given[0] is not None) == known
    # TRL scores every row once. Where its numbers are used, nothing else passes through the model without gradient.
    rows = len(batches[0].prompts)
    makes_old = "num_iterations" in args or "steps_per_generation" in args
    scored = sum(p.rows for p in seen if not p.gradient)
    assert scored == rows if known else scored >= rows * int(makes_old)
    for i, completion in enumerate(batches[0].completions):
        logps = completion_logps(start, batches[0].prompts[i], completion, 1.0).gather(
            1, torch.tensor(completion)[:, None]
        )
        assert batches[0].scores[i] == pytest.approx(logps.mean().item(), rel=1e-4)


def test_the_reference_adapter_is_not_taken_for_the_policy(tmp_path: Path) -> None:
    """With an adapter that was trained before, TRL's reference is a second adapter of the same model."""
    reward = NeedsPolicy()
    trainer, _ = make(tmp_path, lora(trained=True), {"max_steps": 2, "beta": 0.1}, reward_funcs=reward)
    trainer.train()
    assert reward.given == [None, None]
    assert logged(trainer, "kl")[0] == pytest.approx(0.0, abs=1e-6)


def test_log_probabilities_under_dropout_are_not_used(tmp_path: Path) -> None:
    reward = NeedsPolicy()
    trainer, _ = make(
        tmp_path, lora(trained=True, dropout=0.5), {"max_steps": 1, "num_iterations": 2}, reward_funcs=reward
    )
    trainer.train()
    assert reward.given == [None]


class FakeVllm:
    """What TRL asks of vLLM: fixed completions, and their log-probabilities as lists of candidates."""

    def sync_weights(self) -> None:
        pass

    def generate(self, prompts: list, images: Any, num_generations: int, profiler: Any = None) -> tuple:
        return None, [[5, 6, 7, 2] for _ in prompts], [[[-1.0]] * 4 for _ in prompts], None


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_off_policy_rows_beside_vllm(fraction: float, tmp_path: Path) -> None:
    """TRL corrects for the sampler's log-probabilities, which demonstrations do not have."""
    source = RolloutSource(on_policy_fraction=fraction, cross_entropy_weight=1.0)
    trainer, _ = make(tmp_path, lively(dtype=torch.float32), {"max_steps": 1}, rollout=source)
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, FakeVllm(), -1
    trainer.train()
    assert logged(trainer, "cross_entropy")[0] > 0


@pytest.mark.parametrize(
    ("vllm", "processes", "own", "of_any", "sampled"),
    [
        (False, 2, [1, 3], 3, [1, 3]),
        (False, 2, [], 3, [0]),  # this process has nothing to sample, and takes part
        (False, 2, [], 0, []),
        (True, 2, [1], 3, [0, 1, 2, 3]),  # vLLM wants as many rows from each
        (True, 2, [], 3, [0, 1, 2, 3]),
        (True, 2, [], 0, []),
        (True, 1, [1], 1, [1]),
    ],
)
def test_rows_are_sampled_wherever_another_process_samples(
    vllm: bool, processes: int, own: list[int], of_any: int, sampled: list[int], tmp_path: Path
) -> None:
    trainer, _ = make(tmp_path, rollout=RolloutSource(on_policy_fraction=0.5, cross_entropy_weight=1.0))
    trainer.use_vllm, trainer.most_of_any_process = vllm, lambda count: max(count, of_any)
    trainer.accelerator = SimpleNamespace(num_processes=processes)
    assert trainer._in_step(own, 4) == sampled


def test_prompt_ids_are_those_of_the_first_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a tool was called TRL samples again, for the rows that called it and with longer prompts."""
    reward = NeedsPolicy()
    trainer, batches = make(tmp_path, args={"max_steps": 1}, reward_funcs=reward)

    def one_calls_a_tool(_: Any, __: Any, ids: list, texts: list, logprobs: Any, *___: Any) -> tuple:
        trainer._generate_single_turn([[5, 6, 7, 8, 9]], None, {}, 4)
        return [[1] * len(row) for row in ids], texts, ids, logprobs, 1, 0, []

    def tokenised(prompts: list) -> Any:
        trainer.tools = [len]  # from here on: the embedded model's template knows of no tools
        return trainer._encode(prompts, {"tools": None}), None, {}

    monkeypatch.setattr(trainer, "_tokenize_prompts", tokenised)
    monkeypatch.setattr(trainer, "_tool_call_loop", one_calls_a_tool)
    trainer.train()
    assert reward.prompts == [batches[0].prompts]
    assert trainer._rollouts.demonstrated == [False] * 8


def test_prompt_ids_are_those_that_a_rollout_function_says_it_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    reward, asked = NeedsPolicy(), [[5, 6]] * 4 + [[7]] * 4

    def answered(prompts: list, _: Any) -> dict[str, list]:
        return {"prompt_ids": asked, "completion_ids": [[9, 2]] * len(prompts), "logprobs": [[-1.0] * 2] * len(prompts)}

    trainer, batches = make(tmp_path, args={"max_steps": 1}, reward_funcs=reward, rollout_func=answered)
    trainer.train()
    assert reward.prompts == [asked] == [batches[0].prompts]
