"""Micro-batches of rows of similar length, and where rows may be exchanged."""

from pathlib import Path

import pytest
import torch

from selfdistill import Teacher
from selfdistill.training.micro_batches import MicroBatch, sorted_by_length
from tests.training.naive import Hint, by_length, lively, make


def micro_batch(prompts: list[int], **more: object) -> MicroBatch:
    """Rows that are known by their prompt's length, with completions of one token."""
    longest = max(prompts)
    masks = [[0] * (longest - length) + [1] * length for length in prompts]
    return {
        "prompt_mask": torch.tensor(masks),
        "completion_mask": torch.ones(len(prompts), 1, dtype=torch.long),
        "advantages": torch.tensor([float(length) for length in prompts]),
        "names": [str(length) for length in prompts],
        "num_items_in_batch": torch.tensor(7),
        "nothing": None,
        **more,
    }


def test_the_longest_rows_come_first_within_each_window() -> None:
    rows = [[1, 9], [3, 7], [2, 8], [4, 6]]
    batches = [micro_batch([*lengths, 10]) for lengths in rows]
    for batch in batches:  # one width for all, as TRL pads
        assert batch["prompt_mask"].size(1) == 10
    found = sorted_by_length(batches, 2, whole=True)
    assert [batch["names"] for batch in found] == [
        ["10", "10", "9"],
        ["7", "3", "1"],
        ["10", "10", "8"],
        ["6", "4", "2"],
    ]
    for batch in found:
        assert batch["advantages"].tolist() == batch["prompt_mask"].sum(dim=1).tolist() == [*map(float, batch["names"])]
        assert batch["num_items_in_batch"] == 7 and batch["nothing"] is None


def test_rows_that_nobody_teaches_cost_nothing_and_come_last() -> None:
    batches = []
    for lengths in ([9, 2], [8, 3]):
        taught = torch.tensor([[length < 5] for length in lengths])
        batches.append(micro_batch([*lengths, 10][:2], distill_mask=taught))
    for batch in batches:
        batch["prompt_mask"] = torch.nn.functional.pad(batch["prompt_mask"], (10 - batch["prompt_mask"].size(1), 0))
        batch["teacher_prompt_mask"] = batch["prompt_mask"]
    assert [b["names"] for b in sorted_by_length(batches, 2, whole=False)] == [["3", "2"], ["9", "8"]]
    assert [b["names"] for b in sorted_by_length(batches, 2, whole=True)] == [["9", "8"], ["3", "2"]]


def test_images_stay_where_they_are() -> None:
    batches = [micro_batch([1, 2], num_images=[1, 1]), micro_batch([8, 9], num_images=[1, 1])]
    assert sorted_by_length(batches, 2, whole=True) == batches


@pytest.mark.parametrize(
    ("args", "window"),
    [
        ({}, 2),
        ({"gradient_accumulation_steps": 4}, 4),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, 2),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, 2),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 3}, 0),  # a window has rows of two generations
        ({"gradient_accumulation_steps": 1}, 0),
        ({"loss_type": "bnpo"}, 0),  # normalised by the tokens of a micro-batch
        ({"loss_type": "dapo"}, 2),
        ({"top_entropy_quantile": 0.5}, 0),
        ({"entropy_coef": 0.1}, 0),
    ],
)
def test_rows_are_exchanged_where_the_loss_stays_the_same(args: dict, window: int, tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, lively(), args, reward_funcs=by_length)
    assert trainer._sortable_window() == window


def test_without_a_policy_gradient_nothing_is_normalised_over_a_micro_batch(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, lively(), {"loss_type": "bnpo"}, teacher=Teacher(context=Hint()))
    assert trainer._sortable_window() == 2
