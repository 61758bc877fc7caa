"""The table of steps that a run leaves on the terminal: a row as each step comes, and columns that the run has."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from selfdistill.evaluation.monitors import standard_names
from selfdistill.machine.memory import peak_memory_gib
from selfdistill.runs.budget import Budget
from selfdistill.runs.screen import Screen
from selfdistill.text import clock, short
from selfdistill.training.arguments import ENDLESS
from selfdistill.training.reporting import TOTALS

GAP = "  "

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: at most as wide as the column.
        width: in characters.
        text: of a row's values; None where the run has no such value.
        rank: the column with the highest one goes first where the terminal is too narrow.
    """

    title: str
    width: int
    text: Callable[[Values], str | None]
    rank: int = 0


def _metric(name: str) -> Callable[[Values], str | None]:
    return lambda values: short(values.get(name))


def _reward(values: Values) -> str | None:
    reward, spread = short(values.get("reward")), short(values.get("monitor/reward_spread"))
    return reward and (f"{reward} ±{spread}" if spread else reward)


def _dead(values: Values) -> str | None:
    share = values.get("frac_reward_zero_std")
    return None if share is None else f"{share:.0%}"


COLUMNS = (
    Column("step", 9, lambda values: values["place"]),
    Column("reward", 12, _reward),
    Column("dead", 4, _dead, rank=2),
    Column("cross-ent.", 10, _metric("cross_entropy")),
    Column("diverg.", 7, _metric("distill/divergence")),
    Column("KL", 6, _metric("kl"), rank=3),
    Column("length", 6, _metric("monitor/length_tokens")),
    Column("entropy", 7, _metric("monitor/entropy"), rank=1),
    Column("tok/s", 6, lambda values: values.get("speed"), rank=4),
    Column("memory", 6, lambda values: values.get("memory"), rank=5),
    Column("left", 6, lambda values: values.get("left")),
)
EXPLAINED = "reward ±spread within a prompt; dead: prompts whose completions all score alike"


class StepTable(TrainerCallback):
    """Prints a row for the first step, the last one, and so many between that there are about `rows` of them.

    On a terminal a bar below the rows shows how far the training is; a pipe gets the rows alone.

    Args:
        screen: shared with everything else that prints meanwhile; after other tables the header comes again.
        generated: how many tokens the run has generated so far.
        rows: how many rows at most, without the first and the last.
        budget: what ends the training where that is not its number of steps.
    """

    def __init__(
        self,
        screen: Screen,
        generated: Callable[[], int] = lambda: 0,
        rows: int = 38,
        budget: Budget | None = None,
    ) -> None:
        self.screen, self.generated, self.rows, self.budget = screen, generated, rows, budget
        self._bar: Progress | None = None
        self._seen: dict[str, None] = {}
        self._header: tuple[list[Column], int] = [], 0
        self._pending: dict[str, Any] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._first, self._began = state.global_step, time.monotonic()
        self._every = max(1, math.ceil((state.max_steps - state.global_step) / max(self.rows, 1)))
        self._row_step, self._row_tokens, self._seconds = state.global_step, self.generated(), 0.0
        self._logged, self._pending = state.global_step, None
        self._row_share = self._share()
        self.screen.print(Group(Text("training", style="bold"), Text(EXPLAINED, style="dim")))
        self._header = [], 0
        if not self.screen.is_terminal:
            return
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[place]}"),
            TextColumn("{task.fields[left]}"),
            console=self.screen,
            expand=True,
            transient=True,
        )
        self._task = self._bar.add_task("", total=1000, completed=self._done(state), left="", place=_place(state))
        self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done(state), left=self._left(state), place=_place(state))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        logs: Values = event["logs"]
        if TOTALS in logs:
            return
        step, named = state.global_step, standard_names(logs)
        self._seconds += (named.get("time/step_s") or 0.0) * (step - self._logged)
        self._logged = step
        self._pending = {**named, "place": _place(state), "left": self._left(state)}
        due = step // self._every > self._row_step // self._every or self._row_step == self._first
        due = due or int(self._share() * self.rows) > int(self._row_share * self.rows)
        if due or step >= state.max_steps:
            self._print_row(step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._pending is not None:  # the last step, where the training ended before its time
            self._print_row(self._logged)
        self.close()

    def close(self) -> None:
        """Take the bar down; needed where the training ends with an exception, may be called twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _share(self) -> float:
        """How much of the budget is spent."""
        return self.budget.share if self.budget is not None else 0.0

    def _done(self, state: TrainerState) -> int:
        """How much of the training is done, in thousandths."""
        return int(1000 * max(state.global_step / state.max_steps, self._share()))

    def _left(self, state: TrainerState) -> str:
        done, left = state.global_step - self._first, state.max_steps - state.global_step
        if done < 1:
            return ""
        seconds = (time.monotonic() - self._began) / done * left
        by_budget = self.budget.left_s if self.budget is not None else None
        return clock(seconds if by_budget is None else min(seconds, by_budget))

    def _print_row(self, step: int) -> None:
        assert self._pending is not None
        tokens = self.generated()
        if self._seconds > 0 and tokens > self._row_tokens:
            self._pending["speed"] = f"{(tokens - self._row_tokens) / self._seconds:,.0f}"
        gib = max(peak_memory_gib().values())
        self._pending["memory"] = f"{gib:.1f}G" if gib >= 1 else f"{gib * 1024:.0f}M"
        texts = {column.title: text for column in COLUMNS if (text := column.text(self._pending)) is not None}
        self._seen |= dict.fromkeys(texts)
        shown = fitting([column for column in COLUMNS if column.title in self._seen], self.screen.width)
        if (shown, self.screen.blocks) != self._header:
            self.screen.print_line(GAP.join(column.title.rjust(column.width) for column in shown), "bold")
            self._header = shown, self.screen.blocks
        self.screen.print_line(GAP.join(texts.get(column.title, "-").rjust(column.width) for column in shown))
        self._pending, self._row_step, self._row_tokens, self._seconds = None, step, tokens, 0.0
        self._row_share = self._share()


def _place(state: TrainerState) -> str:
    """The step and how many there are, where a budget does not decide that."""
    return f"{state.global_step}/{state.max_steps}" if state.max_steps < ENDLESS else str(state.global_step)


def fitting(columns: list[Column], width: int) -> list[Column]:
    """The columns that a terminal has room for, those of the highest rank left out first."""
    columns = list(columns)
    while sum(column.width + len(GAP) for column in columns) - len(GAP) > width:
        least = max(columns, key=lambda column: column.rank)
        if not least.rank:
            break
        columns.remove(least)
    return columns
