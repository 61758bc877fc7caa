"""A trainer on a tiny random model, and what it must compute, written down a second time without any of its tricks."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from selfdistill import Distillation, SelfDistillConfig
from selfdistill.models.structure import inner_model
from selfdistill.rollout import Rollouts
from selfdistill.teachers.context import Context
from selfdistill.training.trainer import SelfDistillTrainer
from tests.tiny import tiny_model, tiny_tokenizer


def lively(seed: int = 0, tied: bool = True, dtype: torch.dtype = torch.float64) -> Any:
    """A tiny model with peaked predictions that ends its answers after a few tokens."""
    model = tiny_model(seed, tied=tied)
    with torch.no_grad():
        for _, p in model.named_parameters():
            if p.dim() > 1:
                p.mul_(8.0)
    model.generation_config.eos_token_id = [2, 20, 30, 40, 50]  # answers of many lengths
    return model.to(dtype)


def lora(model: Any = None, trained: bool = False, dropout: float = 0.0) -> Any:
    """A tiny model with an adapter; a trained one is not zero."""
    wanted = LoraConfig(
        r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(model or lively(), wanted)
    if trained:
        torch.manual_seed(7)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.3)
    return model


def logged(trainer: Any, name: str) -> list[float]:
    return [line[name] for line in trainer.state.log_history if name in line]


def questions(count: int = 12) -> Dataset:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"say {'x' * (i % 4)}{i}"}],
            "golden_response": ["abcd"[: 1 + i % 4]],
            "answer": str(i),
        }
        for i in range(count)
    ]
    return Dataset.from_list(rows)


@dataclass
class Hint(Context):
    """A context that shows something for some rollouts only, and remembers what it was asked."""

    active: Callable[[int], bool] = lambda i: i % 3 != 1
    seen: list[Rollouts] = field(default_factory=list)

    def prompts(self, rollouts: Rollouts, tokenizer: Any) -> list:
        self.seen.append(rollouts)
        return [
            [{"role": "user", "content": prompt[-1]["content"] + " hint " + "y" * (i % 5)}] if self.active(i) else None
            for i, prompt in enumerate(rollouts.prompts)
        ]


def by_length(completions: list, **_: Any) -> list[float]:
    """A reward that varies within a group."""
    return [float(sum(map(ord, c[0]["content"])) % 5) for c in completions]


def config(folder: Path, **changes: Any) -> SelfDistillConfig:
    """Plain SGD without clipping: the change of a parameter is the gradient times the learning rate."""
    values: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "num_generations": 4, "max_completion_length": 10, "max_steps": 2, "learning_rate": 0.05, "optim": "sgd",
        "max_grad_norm": 0.0, "weight_decay": 0.0, "lr_scheduler_type": "constant", "beta": 0.0, "use_cpu": True,
        "bf16": False, "report_to": [], "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "remove_unused_columns": False, "seed": 3, "dataloader_pin_memory": False,
    }  # fmt: skip
    return SelfDistillConfig(**{**values, **changes})


@dataclass
class Batch:
    """One batch of rollouts as the trainer used it, without padding."""

    prompts: list[list[int]]
    completions: list[list[int]]
    shown: list[list[int] | None]
    scores: list[float | None]
    feedback: list[str | None]
    advantages: Tensor


def make(folder: Path, model: Any = None, args: dict | None = None, **given: Any) -> tuple[Any, list[Batch]]:
    """A trainer, and the list that its rollouts will be written to."""
    batches: list[Batch] = []

    def keep(rollouts: Rollouts, tensors: dict) -> None:
        shown = rollouts.teacher_prompts or None
        ids = trainer._teacher_prompt_ids(shown) if shown is not None else [None] * len(rollouts)
        batches.append(
            Batch(
                prompts=[i[m.bool()].tolist() for i, m in zip(tensors["prompt_ids"], tensors["prompt_mask"])],
                completions=[list(c) for c in rollouts.completion_ids],
                shown=[i if shown is not None and s is not None else None for i, s in zip(ids, shown or ids)],
                scores=list(rollouts.scores),
                feedback=list(rollouts.feedback),
                advantages=tensors["advantages"].clone(),
            )  # fmt: skip
        )

    trainer = SelfDistillTrainer(
        model=model if model is not None else lively(),
        args=config(folder, **(args or {})),
        train_dataset=given.pop("train_dataset", questions()),
        processing_class=given.pop("processing_class", tiny_tokenizer()),
        on_rollouts=keep,
        **given,
    )
    return trainer, batches


def completion_logps(model: nn.Module, prompt: list[int], completion: list[int], temperature: float) -> Tensor:
    """log-probabilities (T, V) in float64 of a single unpadded sequence, from materialised logits."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1].double() / temperature, dim=-1)


def divergence(p: Tensor, q: Tensor, s: Distillation, tokens: Tensor) -> Tensor:
    """Per token (T,), from full log-probabilities of student and teacher."""
    if s.signal == "sampled_token":
        p, q = (x.gather(1, tokens[:, None])[:, 0] for x in (p, q))
        return (p - q).detach() * (1 + p - p.detach())  # the log-ratio, with the gradient of log-ratio times p
    if s.top_k is not None:
        support = p.detach().topk(s.top_k, dim=-1).indices
        p, q = p.gather(1, support), q.gather(1, support)
        if s.tail:
            p, q = (torch.cat([x, torch.log1p(-x.exp().sum(1, keepdim=True))], dim=1) for x in (p, q))
        else:
            p, q = p.log_softmax(1), q.log_softmax(1)
    if s.alpha == 0:
        terms = q.exp() * (q - p)
    elif s.alpha == 1:
        terms = p.exp() * (p - q)
    else:
        m = ((1 - s.alpha) * p.exp() + s.alpha * q.exp()).log()
        terms = s.alpha * q.exp() * (q - m) + (1 - s.alpha) * p.exp() * (p - m)
        if s.jsd_normalize:
            terms = terms / (s.alpha * (1 - s.alpha))
    if s.pointwise_clip is not None:
        terms = terms.clamp(max=s.pointwise_clip)
    return terms.sum(1)


def distillation_loss(
    student: nn.Module, teacher: Callable[[list[int], list[int]], Tensor], batch: Batch, s: Distillation,
    temperature: float = 1.0, old: Sequence[Tensor] | None = None, longest: int = 10,
) -> Tensor:  # fmt: skip
    """The loss of one optimizer step over the whole batch."""
    rows, tokens_of_rows = [], []
    for i, (prompt, completion, shown) in enumerate(zip(batch.prompts, batch.completions, batch.shown)):
        tokens = torch.tensor(completion)
        counted = len(completion) - s.skip_tokens
        active = shown is not None and counted > 0
        if not active and not s.count_inactive_rows:
            continue
        tokens_of_rows.append(max(counted, 0))
        if not active:
            rows.append(torch.zeros(0, dtype=torch.float64))
            continue
        p = completion_logps(student, prompt, completion, s.temperature or temperature)
        with torch.no_grad():
            q = teacher(shown, completion)
        loss = divergence(p, q, s, tokens)
        if old is not None and s.is_clip is not None:
            now = completion_logps(student, prompt, completion, temperature).gather(1, tokens[:, None])[:, 0]
            loss = loss * (now - old[i]).exp().clamp(max=s.is_clip).detach()
        rows.append(loss[s.skip_tokens :])
    count = max(len(rows), 1)
    if s.aggregation == "token_mean":
        return torch.cat(rows).sum() / max(sum(tokens_of_rows), 1)
    if s.aggregation == "seq_mean_token_mean":
        return sum(row.mean() for row in rows if len(row)) / count
    if s.aggregation == "seq_mean_token_sum":
        return sum(row.sum() for row in rows if len(row)) / count
    return sum(row.sum() for row in rows if len(row)) / count / longest


def sgd(model: nn.Module, loss: Tensor, rate: float) -> None:
    """One step of gradient descent on the trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    with torch.no_grad():
        for p, g in zip(parameters, gradients):
            if g is not None:
                p.sub_(rate * g)


def of(model: nn.Module, temperature: float = 1.0) -> Callable[[list[int], list[int]], Tensor]:
    """The teacher that a model is."""
    return lambda prompt, completion: completion_logps(model, prompt, completion, temperature)


def assert_same_parameters(ours: nn.Module, theirs: nn.Module, start: nn.Module, rtol: float = 1e-6) -> None:
    """Both models moved from `start` by the same amount, and did move."""
    moved = 0.0
    for (name, a), b, c in zip(ours.named_parameters(), theirs.parameters(), start.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(
                a.detach() - c, b.detach() - c, rtol=rtol, atol=rtol * 1e-2, msg=lambda m, n=name: f"{n}: {m}"
            )
            moved = max(moved, (a - c).detach().abs().max().item())
    assert moved > 1e-5


@dataclass
class Pass:
    """One forward pass through a backbone."""

    rows: int
    tokens: int
    gradient: bool
    training: bool


@contextmanager
def passes(model: nn.Module) -> Iterator[list[Pass]]:
    """Records the forward passes through a model's backbone, generation left out."""
    seen: list[Pass] = []

    def note(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        mask = kwargs.get("attention_mask")
        if not kwargs.get("use_cache"):
            embedded = output.last_hidden_state
            tokens = int(mask.sum()) if isinstance(mask, Tensor) and mask.dim() == 2 else embedded.shape[:2].numel()
            seen.append(Pass(embedded.size(0), tokens, torch.is_grad_enabled(), module.training))

    hook = inner_model(model).get_decoder().register_forward_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def frozen(model: nn.Module) -> Any:
    """A copy that keeps its own numbers; to be taken before a trainer gets the model."""
    return copy.deepcopy(model)
