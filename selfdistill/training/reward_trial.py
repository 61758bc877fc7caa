"""Whether a reward can read the rows, tried on an empty completion before anything is trained."""

from typing import TYPE_CHECKING, Any

from selfdistill.config.suggestions import guess
from selfdistill.errors import UserError
from selfdistill.rewards.base import Judge
from selfdistill.rewards.mix import Mix

if TYPE_CHECKING:
    from datasets import Dataset

TRIED_ROWS = 1000


def try_reward(reward: Any, train: "Dataset", path: str) -> None:
    """Looks for the columns that a reward names, and has a judge read the rows' answers; others are not called.

    Args:
        reward: as built; None, or one that may be a `Mix`.
        train: the rows as `load_data` makes them.
        path: where they come from, for messages.

    Raises:
        UserError: a column is not there, or an answer is none that this reward can compare with.
    """
    parts = {f"reward.rewards.{name}": part for name, part, _ in reward.parts} if isinstance(reward, Mix) else {}
    for key, part in (parts or {"reward": reward}).items():
        tests = getattr(part, "tests_field", None)
        if isinstance(tests, str) and tests not in train.column_names:
            names = [name for name in train.column_names if name != "prompt"]
            raise UserError(
                f"{key}.tests_field={tests}: the rows of {path} have no such column; they have "
                f"{', '.join(names)}{guess(tests, names)}"
            )
        if isinstance(part, Judge):
            _try_judge(key, part, train, path)


def _try_judge(key: str, judge: Judge, train: "Dataset", path: str) -> None:
    for row in train.select(range(min(len(train), TRIED_ROWS))):
        columns = {name: [value] for name, value in row.items() if name != "prompt"}
        try:
            judge([row["prompt"]], [""], **columns)
        except UserError as error:
            raise UserError(f"{key}: {path}, row {row['id']}: {error}") from None
