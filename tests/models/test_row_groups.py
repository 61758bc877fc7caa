"""Rows of similar length go through a model together, and nobody can tell from the result."""

import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from selfdistill import Distillation, Teacher
from selfdistill.models import row_groups as module
from selfdistill.models import structure
from selfdistill.models.row_groups import RowGroup, row_groups
from selfdistill.models.structure import completion_hidden
from selfdistill.training import rollout_trainer, trainer
from tests.models.architectures import ARCHITECTURES
from tests.training.naive import Hint, by_length, frozen, logged, make

# Plain attention; positions that are told; a state from token to token in some or all layers; experts.
QUICK = ("Qwen3", "GPT-2")
LONG = ("Gemma 2", "LFM2", "Mamba-2", "Zamba2", "Qwen3-Next", "Qwen2-MoE")
# torch's product of many experts takes no float64. Elsewhere only TRL's log-probabilities are rounded to float32.
FLOAT32 = ("Qwen3-Next", "Qwen2-MoE")
SOME = [*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)]
PROMPTS, COMPLETIONS = [3, 20, 4, 21, 1, 9], [9, 2, 8, 3, 1, 4]


def in_best_precision(name: str) -> tuple[Any, float]:
    """A random model, and how much two ways to compute the same of it may differ."""
    model = ARCHITECTURES[name].model()
    return (model, 1e-4) if name in FLOAT32 else (model.double(), 1e-6)


def mask(lengths: list[int], side: str) -> Tensor:
    ones = [torch.ones(length, dtype=torch.long) for length in lengths]
    return pad_sequence(ones, batch_first=True, padding_side=side)


def groups(prompts: list[int], completions: list[int], **how: Any) -> list[RowGroup]:
    return row_groups(mask(prompts, "left"), mask(completions, "right"), **how)


def cost(parts: list[list[int]], prompts: list[int], completions: list[int]) -> int:
    widths = (max(prompts[i] for i in part) + max(completions[i] for i in part) for part in parts)
    return sum(len(part) * width + module.PASS_TOKENS_CPU for part, width in zip(parts, widths, strict=True))


def test_the_groups_are_the_cheapest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all ways to cut the rows, in the order of their length."""
    monkeypatch.setattr(module, "PASS_TOKENS_CPU", 13)
    draw = random.Random(0)
    for _ in range(20):
        prompts = [draw.randint(1, 30) for _ in range(7)]
        completions = [draw.randint(0, 30) for _ in range(7)]
        order = sorted(range(7), key=lambda i: (prompts[i] + completions[i], prompts[i]))
        every = (
            [order[a:b] for a, b in zip((0, *cuts), (*cuts, 7), strict=True)]
            for count in range(7)
            for cuts in combinations(range(1, 7), count)
        )
        least = min(cost(parts, prompts, completions) for parts in every)
        assert cost([group.rows for group in groups(prompts, completions)], prompts, completions) == least


def test_rows_stay_together_where_a_further_pass_costs_more() -> None:
    assert groups([5, 6, 7], [3, 3, 3]) == [RowGroup([0, 1, 2], 7, 3)]
    assert [g.rows for g in groups([5, 600, 7, 610], [3, 3, 3, 3])] == [[0, 2], [1, 3]]
    assert [len(g.rows) for g in groups([5, 600, 7, 610], [3, 3, 3, 3], together=True)] == [4]
    assert [len(g.rows) for g in groups([5, 600, 7, 610, 8], [3] * 5, together=True, most_rows=2)] in (
        [1, 2, 2],
        [2, 1, 2],
        [2, 2, 1],
    )


def test_where_a_pass_takes_all_processes_each_makes_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_collective", lambda: True)
    assert len(groups([5, 600, 7, 610], [3] * 4)) == 1
    assert len(groups([5, 600, 7, 610], [3] * 4, most_rows=2)) == 2


def test_a_row_without_a_completion_has_a_column_for_it() -> None:
    """As where TRL masks completions that were cut off."""
    assert groups([5], [0]) == [RowGroup([0], 5, 1)]


@pytest.mark.parametrize("name", SOME)
def test_hidden_states_and_gradients_are_the_same_in_groups(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tolerance = in_best_precision(name)
    prompt_mask, completion_mask = mask(PROMPTS, "left"), mask(COMPLETIONS, "right")
    ids = torch.randint(4, 40, (6, prompt_mask.size(1) + completion_mask.size(1)), generator=torch.manual_seed(1))
    prompts, completions = ids.split([prompt_mask.size(1), completion_mask.size(1)], dim=1)
    found, passes = [], []
    for further in (10**6, 0):
        monkeypatch.setattr(module, "PASS_TOKENS_CPU", further)
        passes.append(len(row_groups(prompt_mask, completion_mask)))
        model.zero_grad()
        hidden = completion_hidden(model, prompts, prompt_mask, completions, completion_mask)
        kept = hidden[completion_mask.bool()]
        (kept * torch.linspace(-1, 1, kept.size(1), dtype=kept.dtype)).sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((kept.detach(), torch.cat(gradients)))
    assert passes[0] == 1 and passes[1] > 2
    for whole, parts in zip(*found, strict=True):
        assert (whole - parts).norm() <= tolerance * whole.norm()


@pytest.mark.parametrize("name", SOME)
def test_a_step_is_the_same_without_the_padding(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policy gradient with KL and a divergence, rows in other micro-batches, passes in groups."""
    start, tolerance = in_best_precision(name)
    args = {"max_steps": 1, "beta": 0.04, "loss_type": "grpo", "gradient_checkpointing": False}

    def step(folder: str) -> tuple[float, Tensor, list[int]]:
        widths: list[int] = []
        learner, _ = make(
            tmp_path / folder, frozen(start), args, teacher=Teacher(context=Hint()), reward_funcs=by_length,
            distillation=Distillation(alpha=0.5, weight=0.7, policy_weight=0.5),
        )  # fmt: skip
        decoder = structure.inner_model(learner.model).get_decoder()

        def note(_: Any, inputs: tuple, kwargs: dict) -> None:
            if not kwargs.get("use_cache"):
                widths.append(kwargs["attention_mask"].numel())

        decoder.register_forward_pre_hook(note, with_kwargs=True)
        learner.train()
        pairs = zip(learner.model.parameters(), start.parameters(), strict=True)
        return logged(learner, "loss")[0], torch.cat([(a - b).detach().flatten() for a, b in pairs]), widths

    with monkeypatch.context() as patch:
        for place in (structure, rollout_trainer, trainer):
            patch.setattr(
                place, "row_groups", lambda p, c, **_: [RowGroup(list(range(len(p))), p.size(1), max(c.size(1), 1))]
            )
        patch.setattr(trainer, "sorted_by_length", lambda batches, *_, **__: batches)
        loss, moved, padded = step("padded")
    monkeypatch.setattr(module, "PASS_TOKENS_CPU", 0)
    same_loss, same_moved, trimmed = step("trimmed")
    # The policy's terms are of order 1 and cancel almost, since advantages have mean 0.
    assert same_loss == pytest.approx(loss, abs=tolerance)
    assert moved.norm() > 1e-4
    assert (moved - same_moved).norm() <= tolerance * moved.norm()
    assert sum(trimmed) < sum(padded)
