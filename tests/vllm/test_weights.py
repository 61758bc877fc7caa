"""What reaches a vLLM engine in the training process, and how its samples are weighed."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from selfdistill import SelfDistillTrainer
from selfdistill.config.schema import Vllm
from selfdistill.models.loading import load_model
from selfdistill.training.arguments import SelfDistillConfig
from selfdistill.training.engine import starting_vllm

pytestmark = [pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("eager")]
QUESTIONS = ["shout: lamp", "reverse: abc", "add: 3 4", "last of: a b c"]


def by_length(completions: list, **_: Any) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


def make(folder: Path, questions: list[str], **given: Any) -> Any:
    """A trainer with an engine."""
    how = {name: given.pop(name) for name in ("peft_config", "on_rollouts") if name in given}
    model, tokenizer = load_model(name="embedded")
    arguments = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "use_vllm": True, "vllm_mode": "colocate",
        "vllm_max_model_length": 256, "per_device_train_batch_size": 16, "num_generations": 4, "report_to": "none",
        "max_completion_length": 12, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "remove_unused_columns": False, "lr_scheduler_type": "constant", "max_steps": 2,
    }  # fmt: skip
    vllm = Vllm("colocate", 0.3, standby=False, server_base_url=None, tensor_parallel_size=1, max_model_tokens=256)
    with starting_vllm(vllm, cuda=False) if given.get("vllm_mode") != "server" else nullcontext():
        return SelfDistillTrainer(
            model=model,
            reward_funcs=by_length,
            args=SelfDistillConfig(**arguments | given),
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in questions]),
            processing_class=tokenizer,
            **how,
        )


def scored(trainer: Any) -> Tensor:
    """The engine's log-probabilities of the likeliest tokens after each question, as they are after a hand-over."""
    from vllm import SamplingParams

    trainer.vllm_generation.sync_weights()
    prompts = [{"prompt_token_ids": ids} for ids in asked(trainer)]
    how = SamplingParams(max_tokens=1, temperature=1.0, logprobs=20)
    answers = trainer.vllm_generation.llm.generate(prompts, how, use_tqdm=False)
    table = torch.full((len(prompts), len(trainer.processing_class)), float("nan"))
    for row, answer in zip(table, answers, strict=True):
        for token, found in answer.outputs[0].logprobs[0].items():
            row[token] = found.logprob
    return table


def asked(trainer: Any) -> list[list[int]]:
    return [ids_of(trainer, text) for text in QUESTIONS]


def ids_of(trainer: Any, text: str) -> list[int]:
    chat = [{"role": "user", "content": text}]
    return trainer.processing_class.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


@torch.no_grad()
def expected(trainer: Any) -> Tensor:
    """The trained model's own log-probabilities there."""
    rows = [trainer.model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1) for ids in asked(trainer)]
    return torch.stack(rows)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_what_was_learnt_reaches_the_engine(tuning: str, tmp_path: Path) -> None:
    adapter = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    how = {"peft_config": adapter, "learning_rate": 1e-2} if tuning == "lora" else {"learning_rate": 1e-3}
    trainer = make(tmp_path, QUESTIONS * 8, **how)
    before = scored(trainer)
    trainer.train()
    after, wanted = scored(trainer), expected(trainer)
    known = ~after.isnan()
    likely = known & (wanted > -4)
    assert (after - wanted)[likely].abs().max() < 0.1  # 16 bits against 32
    assert (after - before)[likely & ~before.isnan()].abs().max() > 0.5


@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_the_weights_make_up_for_a_sampler_that_differs(temperature: float, tmp_path: Path) -> None:
    """The sampler is made to differ on purpose; weighed, its samples follow the trained model's distribution again."""
    kept: list[tuple[Tensor, Tensor, list[int]]] = []

    def keep(rollouts: Any, tensors: Any) -> None:
        kept.append((tensors["importance_sampling_ratio"], tensors["completion_ids"], rollouts.prompt_ids[0]))

    size = {"per_device_train_batch_size": 2048, "num_generations": 2048, "max_completion_length": 1, "max_steps": 1}
    trainer = make(tmp_path, ["sort: d a c b", "sort: d a c b"], on_rollouts=keep, learning_rate=0.0, **size)
    trainer.vllm_generation.temperature = temperature
    with torch.no_grad():
        ids = ids_of(trainer, "sort: d a c b")
        wanted = trainer.model(torch.tensor([ids])).logits[0, -1].float().softmax(-1)
    trainer.train()
    ((weights, tokens, asked_with),) = kept
    assert asked_with == ids
    counts = torch.zeros_like(wanted)
    plain = counts.index_add(0, tokens[:, 0], torch.ones(len(tokens))) / len(tokens)
    weighed = counts.index_add(0, tokens[:, 0], weights[:, 0].float()) / len(tokens)
    gap, corrected = (plain - wanted).abs().sum(), (weighed - wanted).abs().sum()
    (log,) = [line for line in trainer.state.log_history if "loss" in line]
    logged = log["sampling/sampling_logp_difference/mean"]
    if temperature == 1.0:
        assert logged < 0.05
        assert weights.sub(1).abs().max() < 0.2
    else:
        assert logged > 0.1
        assert corrected < gap / 3
    assert corrected < 0.1
