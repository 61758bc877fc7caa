"""Which rows are trained on and which are evaluated on."""

import hashlib
import json
import logging
from dataclasses import dataclass

from selfdistill.data.table import Table
from selfdistill.errors import UserError
from selfdistill.rollout import Prompt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """A seeded choice of rows; the settings are `load_data`'s. `eval_fraction` is None where no split is made.

    Raises:
        UserError: a setting is out of range.
    """

    eval_fraction: float | None
    seed: int

    def __post_init__(self) -> None:
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise UserError(
                f"data.eval_fraction={self.eval_fraction} must lie between 0 and 1, both excluded: 0.1 keeps a tenth "
                "of the prompts for evaluation. Or give a file with data.eval_path."
            )

    def split(self, table: Table) -> tuple[Table, Table]:
        """Rows for training and for evaluation, both in the file's order; at least one distinct prompt for evaluation.

        Raises:
            UserError: one side would be empty.
        """
        assert self.eval_fraction is not None
        keys = [_key(row.columns["prompt"]) for row in table.rows]
        distinct = sorted(set(keys), key=self._rank)
        count = max(1, round(self.eval_fraction * len(distinct)))
        if count >= len(distinct):
            sides = "evaluation would be empty" if len(distinct) == 1 else "training would be left with nothing"
            raise UserError(
                f"data.path={table.source.name} has {len(distinct)} distinct prompts: with "
                f"data.eval_fraction={self.eval_fraction} {sides}. Give more rows, another fraction, "
                "or a file of its own with data.eval_path."
            )
        held_out = set(distinct[:count])
        rows = list(zip(table.rows, keys, strict=True))
        return (
            Table(table.source, [row for row, key in rows if key not in held_out]),
            Table(table.source, [row for row, key in rows if key in held_out]),
        )

    def sample(self, table: Table, count: int | None) -> Table:
        """At most so many rows, in the file's order; None for all. A larger choice includes the smaller ones."""
        if count is None or count >= len(table.rows):
            return table
        # Ranked by line and id, since the split has already divided the rows by the rank of their prompts.
        order = sorted(table.rows, key=lambda row: self._rank(f"{row.line} {row.columns['id']}"))
        return Table(table.source, sorted(order[:count], key=lambda row: row.line))

    def _rank(self, key: str) -> bytes:
        """A random order that depends on the key and the seed alone, not on the other rows or their order."""
        salt = (self.seed % 2**64).to_bytes(8, "big")
        return hashlib.blake2b(key.encode(), digest_size=16, salt=salt).digest()


def warn_of_shared_prompts(train: Table, evaluation: Table) -> None:
    """Logs a warning where prompts are both trained on and evaluated on."""
    lines = {_key(row.columns["prompt"]): row.line for row in train.rows}
    shared = [row for row in evaluation.rows if _key(row.columns["prompt"]) in lines]
    if shared:
        log.warning(
            "%d of %d evaluation prompts are also trained on, so accuracy looks better than it is; first: %s and %s",
            len(shared),
            len(evaluation.rows),
            evaluation.source.place(shared[0].line),
            train.source.place(lines[_key(shared[0].columns["prompt"])]),
        )


def _key(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
