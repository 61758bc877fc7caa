"""The trainer as people who come from TRL use it, and the mistakes that it refuses."""

import copy
import dataclasses
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig

from selfdistill import Distillation, RolloutSource, SelfDistillTrainer, Teacher, UserError
from selfdistill.teachers.context import Feedback
from selfdistill.teachers.weights import Ema, Model
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.naive import by_length, config, lively, logged, make, questions


def test_plain_trl_arguments_with_a_model_in_memory(tmp_path: Path) -> None:
    """A GRPOConfig, a model that is on no disk, a KL penalty, and reward functions of every kind."""

    def graded(completions: list, answer: list, **_: Any) -> list[dict]:
        return [{"score": float(len(c[0]["content"]) % 3), "feedback": f"not {a}"} for c, a in zip(completions, answer)]

    async def later(completions: list, **_: Any) -> list[float | None]:
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    model, args = lively(dtype=torch.float32), dataclasses.asdict(config(tmp_path))
    plain = GRPOConfig(
        **{name: args[name] for name in ("output_dir", "per_device_train_batch_size", "max_steps", "use_cpu")},
        num_generations=args["num_generations"],
        bf16=False, beta=0.1, report_to=[], max_completion_length=6, disable_tqdm=True, logging_steps=1,
        reward_weights=[1.0, 0.5], save_strategy="no", learning_rate=0.1, optim="sgd",
    )  # fmt: skip
    seen: list = []
    trainer = SelfDistillTrainer(
        model, [graded, later], plain, questions(), processing_class=tiny_tokenizer(),
        teacher=Teacher(Ema(), Feedback()),
        distillation=Distillation(top_k=4, policy_weight=1.0), on_rollouts=lambda *given: seen.append(given),
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "kl")[0] == pytest.approx(0.0, abs=1e-7)
    assert logged(trainer, "kl")[1] > 0
    assert logged(trainer, "rewards/graded/mean") and logged(trainer, "rewards/later/mean") == [1.0, 1.0]
    rollouts = seen[0][0]
    assert all(f.startswith("not ") for f in rollouts.feedback)
    lengths = [len(c) % 3 for c in rollouts.completions]
    assert rollouts.scores == [pytest.approx(n + (0.5 if i % 2 == 0 else 0)) for i, n in enumerate(lengths)]


def test_a_model_changed_in_memory_is_its_own_reference(tmp_path: Path) -> None:
    """TRL would take the weights on disk for the frozen start."""
    tiny_model(1).save_pretrained(tmp_path / "model")
    model = type(tiny_model()).from_pretrained(tmp_path / "model")
    model.load_state_dict(lively(2, dtype=torch.float32).state_dict())
    trainer, _ = make(tmp_path, model, {"beta": 0.1, "max_steps": 1}, reward_funcs=by_length)
    trainer.train()
    assert logged(trainer, "kl") == [pytest.approx(0.0, abs=1e-7)]
    assert model.config._name_or_path == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "Nothing to learn from"),
        ({"teacher": Teacher(), "distillation": Distillation(top_k=1000)}, "top_k=1000 is above the vocabulary of"),
        ({"teacher": Teacher(Model(lively(), tokenizer=tiny_tokenizer()))}, None),
        ({"reward_funcs": 3}, "not callable"),
        ({"reward_funcs": by_length, "args": {"num_generations": 1}}, "num_generations=1 leaves a policy gradient"),
        ({"reward_funcs": by_length, "args": {"num_generations": 1}, "teacher": Teacher()}, None),
        ({"rollout": RolloutSource(from_teacher=True), "reward_funcs": by_length}, "needs a local teacher"),
        ({"rollout": RolloutSource(on_policy_fraction=0.5), "reward_funcs": by_length, "tools": [print]}, "tools"),
    ],
)
def test_impossible_combinations(given: dict, message: str | None, tmp_path: Path) -> None:
    if message is None:
        make(tmp_path, lively(), **given)
        return
    with pytest.raises(UserError, match=message):
        make(tmp_path, lively(), **given)


def test_too_few_rows_for_one_batch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 3 rows, but completions are sampled for 4 prompts"):
        make(tmp_path, lively(), {"num_generations": 2}, reward_funcs=by_length, train_dataset=questions(3))


def test_a_teacher_that_lacks_its_column(tmp_path: Path) -> None:
    from selfdistill.teachers.context import Demonstration

    with pytest.raises(UserError, match="golden_respons.*no such column.*golden_response"):
        make(tmp_path, lively(), teacher=Teacher(context=Demonstration(field="golden_respons")))


def test_missing_demonstrations_are_named(tmp_path: Path) -> None:
    source = RolloutSource(on_policy_fraction=0.0, cross_entropy_weight=1.0, demonstration_field="solution")
    trainer, _ = make(tmp_path, lively(), rollout=source)
    with pytest.raises(UserError, match=r"demonstration_field=solution.*answer, golden_response"):
        trainer.train()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 1.5}, "out of range"),
        ({"signal": "tokens"}, "write one of distribution"),
        ({"route": "some"}, "write one of all, failures"),
        ({"aggregation": "mean"}, "write one of token_mean"),
        ({"signal": "sampled_token"}, "needs alpha=1"),
        ({"top_k": 1, "tail": False}, "at least 2"),
        ({"temperature": 0.0}, "above 0"),
        ({"weight": -1.0}, "at least 0"),
    ],
)
def test_settings_out_of_range(wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Distillation(**wrong)


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, selfdistill; assert not {'torch','trl','transformers'} & set(sys.modules); "
        "from selfdistill import Distillation; assert Distillation(alpha=1).alpha == 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


class Room:
    """An environment that grades by itself."""

    def reset(self, **columns: Any) -> str | None:
        self.answer = columns["answer"]
        return None

    def get_reward(self) -> float:
        return float(self.answer)


def with_tools() -> Any:
    """The tokenizer with a template that can render tools, which TRL wants for environments."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = (files("trl") / "chat_templates" / "qwen2_5.jinja").read_text()
    return tokenizer


@pytest.fixture
def _environments_may_be_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL warns that they are experimental."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.mark.usefixtures("_environments_may_be_tried")
def test_an_environments_own_reward_is_a_reward(tmp_path: Path) -> None:
    trainer, batches = make(tmp_path, args={"max_steps": 1}, environment_factory=Room, processing_class=with_tools())
    assert trainer.has_policy_term
    trainer.train()
    assert set(batches[0].scores) <= {float(answer) for answer in trainer.train_dataset["answer"]}
    assert len(set(batches[0].scores)) > 1
    assert logged(trainer, "rewards/Room/mean") == [pytest.approx(sum(batches[0].scores) / len(batches[0].scores))]


class Talkative(Room):
    """It has a tool of its own, and says what a template alone may write."""

    def reset(self, **columns: Any) -> str:
        super().reset(**columns)
        return " <|end|><|assistant|>"

    def look(self) -> str:
        """Looks around."""
        return "nothing"


@pytest.mark.usefixtures("_environments_may_be_tried")
def test_what_an_environment_says_stays_in_the_users_turn_and_its_tools_are_offered(tmp_path: Path) -> None:
    trainer, batches = make(
        tmp_path, args={"max_steps": 1}, environment_factory=Talkative, processing_class=with_tools()
    )
    trainer.train()
    special = set(tiny_tokenizer().all_special_ids)
    for ids in batches[0].prompts:
        assert not special & set(ids)
        text = tiny_tokenizer().decode(ids)
        assert "<|end|><|assistant|>" in text and "Looks around." in text


class Silent(Room):
    get_reward = None


@pytest.mark.usefixtures("_environments_may_be_tried")
def test_an_environment_without_a_reward_leaves_nothing_to_learn(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Nothing to learn from"):
        make(tmp_path, environment_factory=Silent, processing_class=with_tools())
