"""Which rows go through the model together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Ids = Sequence[Sequence[int]]  # token ids, one list per row
# Shared prompts cost a second call and an attention mask: they must save at least this share of the tokens.
LEAST_SAVING = 0.25


@dataclass(frozen=True)
class ScoringBatch:
    """Rows of one micro-batch.

    Attributes:
        rows: their indices.
        prompts: for each row the number of its prompt among the batch's distinct ones, which go through the model once;
            None where each row goes through with its own prompt.
        padded_tokens: what the model computes, padding included.
    """

    rows: list[int]
    prompts: list[int] | None
    padded_tokens: int


def plan(
    prompts: Ids, counts: Sequence[int], budget_tokens: int, shared_budget_tokens: int | None
) -> list[ScoringBatch]:
    """Micro-batches of all rows with something to score, with each prompt's pass shared by its rows where that pays.

    Args:
        prompts: the prompt of each row.
        counts: tokens to score in each row.
        budget_tokens: padded tokens of a batch without sharing.
        shared_budget_tokens: prompt and completion tokens of all rows of a batch with sharing, since the prompt's keys
            and values are held for each row; None = never share.
    """
    rows = [row for row, count in enumerate(counts) if count]
    alone = list(_alone(rows, prompts, counts, budget_tokens))
    if shared_budget_tokens is None or any(len(prompts[row]) < 2 for row in rows):
        return alone
    shared = list(_shared(rows, prompts, counts, shared_budget_tokens))
    spent, without = (sum(batch.padded_tokens for batch in batches) for batches in (shared, alone))
    return shared if spent <= (1 - LEAST_SAVING) * without else alone


def _alone(rows: list[int], prompts: Ids, counts: Sequence[int], budget: int) -> Iterator[ScoringBatch]:
    """Similar lengths together: the last row of a batch is its longest."""
    lengths = {row: len(prompts[row]) + counts[row] - 1 for row in rows}

    def padded(batch: list[int]) -> int:
        return len(batch) * lengths[batch[-1]]

    for batch in _filled(sorted(rows, key=lengths.__getitem__), padded, budget):
        yield ScoringBatch(batch, None, padded(batch))


def _shared(rows: list[int], prompts: Ids, counts: Sequence[int], budget: int) -> Iterator[ScoringBatch]:
    """Equal prompts together, prompts of similar length next to each other: the last of a batch is its longest."""

    def held(batch: list[int]) -> int:
        return len(batch) * (len(prompts[batch[-1]]) + max(counts[row] for row in batch))

    order = sorted(rows, key=lambda row: (len(prompts[row]), tuple(prompts[row]), counts[row]))
    for batch in _filled(order, held, budget):
        distinct: dict[tuple[int, ...], int] = {}
        places = [distinct.setdefault(tuple(prompts[row]), len(distinct)) for row in batch]
        # The prompt's last token predicts the first of the completion, and goes through with it.
        padded = len(distinct) * (len(prompts[batch[-1]]) - 1) + len(batch) * max(counts[row] for row in batch)
        yield ScoringBatch(batch, places, padded)


def _filled(rows: list[int], tokens: Callable[[list[int]], int], budget: int) -> Iterator[list[int]]:
    """Neighbouring rows together for as long as their tokens stay within the budget; at least one row in each batch."""
    batch: list[int] = []
    for row in rows:
        if batch and tokens([*batch, row]) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
