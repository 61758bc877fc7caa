"""Completions that are taken from the data instead of sampled (GKD's off-policy share; plain fine-tuning)."""

import logging
import random
from collections.abc import Mapping
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from selfdistill.errors import UserError
from selfdistill.tokens import encode, end_of_turn

log = logging.getLogger(__name__)


def demonstrated_groups(on_policy_fraction: float, groups: range, *, seed: int, micro_batch: int) -> list[bool]:
    """Which groups take their demonstration.

    It depends on seed and time alone, so that a resumed run takes the same ones.

    Args:
        groups: the numbers of the groups among those of all processes.
        micro_batch: how many micro-batches were trained on before.
    """
    return [random.Random(f"{seed} {micro_batch} {group}").random() >= on_policy_fraction for group in groups]


def demonstration_ids(
    row: Mapping[str, Any],
    field: str,
    tokenizer: PreTrainedTokenizerBase,
    max_completion_tokens: int,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The row's demonstration as token ids, ended as an answer ends: by the chat's end of turn, or end of sequence.

    Of a list the first text counts. One that is too long is cut and then has no end, as a completion that reaches the
    limit. The row's prompt says whether it is a chat.

    Raises:
        UserError: the row has none, or nothing ends an answer.
    """
    texts = row.get(field)
    text = texts[0] if isinstance(texts, list) and texts else texts
    if not isinstance(text, str) or not text:
        columns = ", ".join(sorted(row))
        raise UserError(f"rollout.demonstration_field={field}: a row has no demonstration there (columns: {columns}).")
    turn = None if isinstance(row["prompt"], str) else end_of_turn(tokenizer, template_kwargs)
    end = tokenizer.eos_token_id if turn is None else turn
    if end is None:
        raise UserError(
            "rollout.on_policy_fraction: demonstrations have no end, since neither the tokenizer has an end of "
            "sequence nor the chat template an end of turn. Set eos_token in the model's tokenizer_config.json."
        )
    ids = [*encode(tokenizer, text), end]
    if len(ids) > max_completion_tokens:
        _warn_of_cut(field, len(ids), max_completion_tokens)
    return ids[:max_completion_tokens]


@cache
def _warn_of_cut(field: str, tokens: int, limit: int) -> None:
    log.warning(
        "a %s has %d tokens and is cut at rollout.max_completion_tokens=%d: how it ends is not learned",
        field,
        tokens,
        limit,
    )
