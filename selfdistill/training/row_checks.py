"""Whether the rows to train on have what rewards and rollouts read, before anything is trained."""

from typing import TYPE_CHECKING, Any

from selfdistill.config.settings import RolloutSource
from selfdistill.config.suggestions import guess
from selfdistill.errors import UserError
from selfdistill.rewards.mix import Mix
from selfdistill.rewards.supervised import Supervised
from selfdistill.rollout import shown_in

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def answer_field(reward: Any) -> str | None:
    """The column with the answers that a reward compares with; None for one that compares with none, or a function."""
    return getattr(reward, "answer_field", None)


def check_rows(
    reward: Any,
    train: "Dataset",
    rollout: RolloutSource,
    path: str,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> None:
    """Checks the rows for the reward and for demonstrations. What a teacher's context reads is checked by the trainer.

    Args:
        reward: as built; None, or one that may be a `Mix`.
        train: the rows as `load_data` makes them.
        path: where they come from, for messages.
        tokenizer: the student's, to tell how long answers are; that is not checked without it.

    Raises:
        UserError: a reward compares with answers and no row has one, or has no signal for answers as these are, or a
            row lacks the demonstration that takes the place of the student's completion.
    """
    parts = {f"reward.rewards.{name}": part for name, part, _ in reward.parts} if isinstance(reward, Mix) else {}
    for key, part in (parts or {"reward": reward}).items():
        if field := answer_field(part):
            _check_answers(key, field, train, path)
            if isinstance(part, Supervised) and tokenizer is not None:
                part.check_answers(key, [answer for answer in train[field] if answer], tokenizer)
    if rollout.on_policy_fraction < 1:
        _check_demonstrations(rollout, train, path)


def _check_answers(reward: str, field: str, train: "Dataset", path: str) -> None:
    key = f"{reward}.answer_field={field}"
    if field not in train.column_names:
        raise UserError(_no_column(key, field, train, path))
    if not any(train[field]) and not any(train["golden_response"]):
        raise UserError(
            f"{key}: no row of {path} has an answer (answer and golden_response are empty in all), so that no "
            f"completion could be scored. The rows' other fields: {', '.join(_own_fields(train)) or 'none'}. "
            "Name the one with the answers with data.answer_field=NAME, or choose a reward that needs none."
        )


def _check_demonstrations(rollout: RolloutSource, train: "Dataset", path: str) -> None:
    field = rollout.demonstration_field
    key = f"rollout.demonstration_field={field}"
    if field not in train.column_names:
        raise UserError(_no_column(key, field, train, path))
    texts = shown_in({name: train[name] for name in {field, "answer"} & set(train.column_names)}, field)
    if not any(texts):
        raise UserError(
            f"{key}: no row of {path} has a demonstration, which this run learns from (golden_response and answer are "
            f"empty in all). The rows' other fields: {', '.join(_own_fields(train)) or 'none'}. Name the one with the "
            "demonstrations with data.demonstration_field=NAME."
        )
    for row, text in zip(train["id"], texts, strict=True):
        if not text:
            # The id of a row that brings none is its line.
            raise UserError(
                f"{key}: {path}, row {row} has no demonstration, and rollout.on_policy_fraction="
                f"{rollout.on_policy_fraction} may ask any row for one. Write one there, or leave such rows out: "
                "data.require=[golden_response] data.on_bad_row=skip."
            )


def _no_column(key: str, field: str, train: "Dataset", path: str) -> str:
    names = [name for name in train.column_names if name != "prompt"]
    return f"{key}: the rows of {path} have no such column; they have {', '.join(names)}{guess(field, names)}"


def _own_fields(train: "Dataset") -> list[str]:
    return [name for name in train.column_names if name not in ("prompt", "answer", "golden_response", "id")]
