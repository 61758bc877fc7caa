"""What a run shows on the terminal: its choices, the plan, sample completions, the result, where everything lies.

Every function returns something that rich prints; all of it reads well as plain text in 80 columns.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from selfdistill.config.batch import Batch
from selfdistill.config.secrets import Redactor
from selfdistill.goals import is_more_better
from selfdistill.text import escaped


@dataclass(frozen=True)
class Plan:
    """What a run is going to do.

    Attributes:
        model: name or path of the student.
        device: for example "cpu" or "NVIDIA H200, bfloat16".
        parameters: parameters of the student.
        trained: those that are trained.
        train_rows: rows of the training data.
        eval_rows: rows of the evaluation data.
        max_steps: optimiser steps.
        batch: how the completions of one step are spread.
        num_generations: completions of one prompt, G.
        weights: their precision, for example "bfloat16, trained in float32".
        adapter: for example "LoRA, rank 32"; empty for full training.
        teacher: for example "ema 0.99, sees a demonstration"; empty without one.
        judge: who judges the answers of the evaluation.
        memory_gib: estimate by part, for example {"weights": 1.2, "optimizer": 0.1}; None where it is shown elsewhere.
        available_gib: what the device has, where that is known.
        learning_rate: the highest of the run.
        budget: what ends the run besides its steps, for example "600 s of steps".
        endless: whether that alone ends it.
    """

    model: str
    device: str
    parameters: int
    trained: int
    train_rows: int
    eval_rows: int
    max_steps: int
    batch: Batch
    num_generations: int
    weights: str = ""
    adapter: str = ""
    teacher: str = ""
    judge: str = ""
    memory_gib: Mapping[str, float] | None = None
    available_gib: float | None = None
    learning_rate: float | None = None
    budget: str = ""
    endless: bool = False


def make_console(**options: Any) -> Console:
    """The console of the program: no emoji codes, no guessed highlights, no colour where there is no terminal."""
    return Console(highlight=False, emoji=False, **options)


def config_tree(config: DictConfig) -> Tree:
    """The composed configuration, secrets masked; groups first, in the order of their composition."""
    tree = Tree(Text("configuration", style="bold"), guide_style="dim")
    _add_branches(tree, Redactor(config).config)
    return tree


def differences(
    config: DictConfig, defaults: DictConfig, usual: Mapping[str, str], choices: Mapping[str, str]
) -> Group:
    """What a run was told beyond the defaults: the options chosen of groups, then keys, a line for each group.

    Args:
        config: the run's configuration; its secrets are masked.
        defaults: what would have been composed with the same options and nothing else said.
        usual: the option that each group has when nothing is said.
        choices: the option chosen of each group.
    """
    options = " ".join(f"{group}={option}" for group, option in choices.items() if usual.get(group) != option)
    facts: dict[str, list[str]] = {}
    before, written = (flat(OmegaConf.to_container(defaults, resolve=resolve)) for resolve in (True, False))
    values = flat(Redactor(config).config)
    for key, value in values.items():
        source = re.fullmatch(r"\$\{([\w.]+)\}", str(written.get(key)))
        follows = source is not None and values.get(source[1]) == value  # what it follows is shown
        if before.get(key, ...) != value and not follows and not key.endswith("_target_"):
            group, _, name = key.rpartition(".")
            facts.setdefault(group, []).append(f"{name or key}={_yaml_value(value)}")
    lines = {"chosen": options} if options else {}
    lines |= {group or "keys": "  ".join(values) for group, values in sorted(facts.items())}
    shown: dict[str, str | Text] = {name: escaped(text) for name, text in lines.items()}
    return _facts("differs from the defaults", shown or {"": "nothing"})


def flat(values: Any, prefix: str = "", joined_by: str = ".") -> dict[str, Any]:
    """Nested mappings as one, keys joined; lists stay values, an empty mapping is left out."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        result.update(flat(value, f"{name}{joined_by}", joined_by) if isinstance(value, Mapping) else {name: value})
    return result


def evaluation_line(step: int, metrics: Mapping[str, float]) -> str:
    """What an evaluation found, without the single suites."""
    short = {name.removeprefix("eval/"): value for name, value in metrics.items()}
    found = [f"{name} {_number(value)}" for name, value in short.items() if "/" not in name]
    return "  ".join([f"evaluation at step {step}:", *found])


def plan_table(plan: Plan) -> Group:
    """Model, parameters, batch arithmetic and memory, one a line."""
    share = plan.trained / max(plan.parameters, 1)  # sharded parameters can look empty
    method = plan.adapter or ("all weights" if plan.trained == plan.parameters else "some weights")
    batch, prompts = plan.batch, plan.batch.completions / plan.num_generations
    arithmetic = f"{batch.per_device} completions x {batch.accumulation_steps} accumulated"
    if batch.processes > 1:
        arithmetic += f" x {batch.processes} processes"
    total = plan.max_steps * batch.completions
    passes = f" = {plan.max_steps * prompts / plan.train_rows:.2f} passes over the data" if plan.train_rows else ""
    steps = "" if plan.endless else f"{plan.max_steps:,} steps = {total:,} completions{passes}"
    known = f"{count(plan.parameters)}, {count(plan.trained)} trained ({share:.1%}; {method})"
    facts: dict[str, str | Text] = {
        "model": plan.model,
        "parameters": known if plan.parameters else "",
        "weights": plan.weights,
        "device": plan.device,
        "teacher": plan.teacher,
        "judge": plan.judge,
        "data": f"{plan.train_rows:,} rows to train on, {plan.eval_rows:,} held out" if plan.train_rows else "",
        "learning": f"rate {plan.learning_rate:g}" if plan.learning_rate else "",
        "a step": f"{arithmetic} = {batch.completions}: {prompts:g} prompts x {plan.num_generations} generations",
        "the run": ", at most ".join(filter(None, (steps, plan.budget))),
        "memory": "" if plan.memory_gib is None else memory_line(plan.memory_gib, plan.available_gib),
    }
    return _facts("plan", facts)


def memory_line(memory_gib: Mapping[str, float], available_gib: float | None = None) -> Text:
    """The estimate by part and in sum, red where it is more than the device has."""
    if not memory_gib:
        return Text("unknown before loading: write model.parameters_billion to estimate it")
    total = sum(memory_gib.values())
    parts = ", ".join(f"{name} {size(value)}" for name, value in memory_gib.items())
    text = f"about {size(total)} and activations ({parts})"
    if available_gib is None:
        return Text(text)
    return Text(f"{text}, of {size(available_gib)}", style="red" if total > available_gib else "")


def memory_table(
    kept: Mapping[str, float], phases: Mapping[str, float], limit: float | None = None, whose: str = ""
) -> Group:
    """Memory by part, what each phase of a step takes beside it, and the peak, red where it is more than there is.

    Args:
        kept: GiB of what stays.
        phases: GiB beside it, at the most; empty where it is not known.
        limit, whose: GiB that there are, and whose memory that is.
    """
    if not kept:
        return _facts("memory", {"peak": memory_line({})})
    most = max(phases, key=phases.__getitem__, default="")
    total = sum(kept.values()) + phases.get(most, 0.0)
    facts: dict[str, str | Text] = {name: size(value) for name, value in kept.items()}
    facts |= {name: f"+ {size(value)}{' at the most' if name == most else ''}" for name, value in phases.items()}
    beyond = "" if phases else " and activations, which could not be tried without the model"
    there_is = "" if limit is None else f", of {size(limit)} ({whose})"
    style = "red" if limit is not None and total > limit else ""
    return _facts("memory", {**facts, "peak": Text(f"about {size(total)}{beyond}{there_is}", style=style)})


def change_table(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> Table:
    """Evaluation before, after and the change, which is green where it is for the better.

    Args:
        before: metrics before the training, for example {"accuracy": 0.1, "retention/sort": 1.0, "forgetting": 0.0}.
            Green is what is better: see `goals`.
        after: the same after it; a metric that is missing on one side shows "-".
    """
    table = _titled("before and after")
    table.add_column("metric")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name), after.get(name)
        change = Text("-") if old is None or new is None else _change(name, new - old)
        table.add_row(Text(name), _number(old), _number(new), change)
    return table


def samples_table(step: int, rows: Sequence[Mapping[str, Any]], characters: int = 160) -> Table:
    """Sampled completions of one step.

    Args:
        step: the training step.
        rows: mappings with prompt, completion, reward and, if there are any, feedback and advantage.
        characters: longest text of a cell; longer prompts lose their beginning, longer completions their middle.
    """
    has_feedback = any(row.get("feedback") for row in rows)
    table = _titled(f"completions at step {step}", leading=1)
    table.add_column("prompt", ratio=3, overflow="fold")
    table.add_column("completion", ratio=4, overflow="fold")
    if has_feedback:
        table.add_column("feedback", ratio=2, overflow="fold")
    table.add_column("reward", justify="right", no_wrap=True)
    table.add_column("advantage", justify="right", no_wrap=True)
    for row in rows:
        prompt, completion = _one_text(row.get("prompt")), _one_text(row.get("completion"))
        texts = [_last(prompt, characters), _ends(completion, characters)]
        if has_feedback:
            texts.append(_ends(row.get("feedback") or "", characters))
        cells = [Text(escaped(text)) for text in texts]
        table.add_row(*cells, _number(row.get("reward")), _number(row.get("advantage")))
    return table


def differing(rows: Sequence[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    """At most `limit` completions of one step, as different as there are.

    No completion of a prompt comes twice. The one with the highest advantage comes first, then the one with the lowest,
    then the others, the first of each prompt before the second of any.
    """
    unique: dict[tuple[str, str], Mapping[str, Any]] = {}
    turn: dict[tuple[str, str], int] = {}
    prompts: dict[str, int] = {}
    for row in rows:
        prompt, completion = str(row.get("prompt")), str(row.get("completion"))
        if (prompt, completion) not in unique:
            unique[prompt, completion] = row
            turn[prompt, completion] = prompts[prompt] = prompts.get(prompt, -1) + 1
    keys = sorted(unique, key=lambda key: turn[key])
    by_advantage = sorted(keys, key=lambda key: unique[key].get("advantage") or 0.0)
    ends = [by_advantage[-1], by_advantage[0]] if keys else []
    return [unique[key] for key in dict.fromkeys([*ends, *keys])][:limit]


def where_table(places: Mapping[str, str | Path | None]) -> Group:
    """Where everything lies; what is None or an empty text is left out. Paths are shown from the current folder."""
    return _facts("where everything lies", {name: _from_here(place) for name, place in places.items() if place})


def count(number: int) -> str:
    """A number of parameters: 812, 860 K, 1.24 B."""
    for power, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= power:
            return f"{number / power:.3g} {unit}"
    return str(number)


def size(gib: float) -> str:
    """An amount of memory: 0.4 MiB, 250 MiB, 17.3 GiB."""
    if gib >= 1:
        return f"{gib:.1f} GiB"
    mib = gib * 1024
    return f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"


def print_all(console: Console, *renderables: Any) -> None:
    """Print with a blank line between."""
    for renderable in renderables:
        console.print(Group(renderable, ""))


def _add_branches(tree: Tree, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            _add_branches(tree.add(Text(str(key), style="bold")), value)
        else:
            tree.add(Text.assemble(f"{key}: ", (_yaml_value(value), "cyan")))


def _yaml_value(value: Any) -> str:
    if isinstance(value, str):
        return value if value and value == value.strip() and "\n" not in value else repr(value)
    return json.dumps(value, ensure_ascii=False)


def _facts(title: str, facts: Mapping[str, str | Text]) -> Group:
    """Names and values, one pair a line; what is empty is left out."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in facts.items():
        if fact:
            table.add_row(name, fact if isinstance(fact, Text) else Text(fact))
    # A title of the table itself would be wrapped at the table's width.
    return Group(Text(title, style="bold"), table)


def _titled(title: str, **options: Any) -> Table:
    return Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False, **options)


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    if value == 0 or 0.001 <= abs(value) < 10_000:
        return f"{value:.3f}"
    return f"{value:.2e}"


def _change(name: str, difference: float) -> Text:
    text = f"{difference:+.3f}" if difference == 0 or abs(difference) >= 0.001 else f"{difference:+.1e}"
    if difference == 0:
        return Text(text)
    return Text(text, style="green" if (difference > 0) == is_more_better(name) else "red")


def _one_text(value: Any) -> str:
    """Prompts and completions are texts, or lists of messages."""
    if isinstance(value, str):
        return value
    if not value:
        return ""
    messages = [f"{message['role']}: {message['content']}" for message in value]
    return messages[0].removeprefix("assistant: ") if len(messages) == 1 else "\n".join(messages)


def _last(text: str, characters: int) -> str:
    return text if len(text) <= characters else "..." + text[3 - characters :]


def _ends(text: str, characters: int) -> str:
    if len(text) <= characters:
        return text
    half = (characters - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def _from_here(place: str | Path) -> str:
    if isinstance(place, Path) and place.absolute().is_relative_to(Path.cwd()):
        return str(place.absolute().relative_to(Path.cwd()))
    return str(place)
