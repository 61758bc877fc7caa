"""What a sequence of tasks shows: a table, sequence.json, sequence.md and a picture."""

import json
from pathlib import Path

from rich import box
from rich.table import Table

from selfdistill.evaluation.transfer import AccuracyMatrix
from selfdistill.files import draft_of, write_atomically

DATA, PAGE, PICTURE = "sequence.json", "sequence.md", "sequence.png"
REPORT = (DATA, PAGE, PICTURE)
MEANS = {
    "eval/accuracy": "average accuracy at the end",
    "eval/learned": "accuracy of each task right after its own stage, mean",
    "eval/backward_transfer": "backward transfer: change of the earlier tasks since their own stage",
    "eval/forward_transfer": "forward transfer: what the later tasks had gained before their own stage",
    "eval/task_forgetting": "forgetting: what the earlier tasks lost since they were best",
}


def stages_of(matrix: AccuracyMatrix) -> list[str]:
    """The names of the matrix's rows."""
    return ["start", *(f"after {task}" for task in matrix.tasks[: len(matrix.rows) - 1])]


def matrix_table(matrix: AccuracyMatrix) -> Table:
    """The accuracies for the terminal, and the measures once every task is trained."""
    table = Table(box=box.SIMPLE_HEAD, title="accuracy by stage and task", title_justify="left", pad_edge=False)
    table.add_column("")
    for task in matrix.tasks:
        table.add_column(task, justify="right")
    table.add_column("mean", justify="right")
    for place, (name, row) in enumerate(zip(stages_of(matrix), matrix.rows, strict=True)):
        table.add_row(name, *(f"{row[task]:.3f}" for task in matrix.tasks), f"{matrix.average_accuracy(place):.3f}")
    if matrix.is_complete:
        table.caption_justify = "left"
        table.caption = "\n".join(f"{MEANS[name]}: {value:.3f}" for name, value in matrix.measures().items())
    return table


def write_report(folder: Path, matrix: AccuracyMatrix) -> None:
    """Writes sequence.json, sequence.md and sequence.png; each replaces what was there as a whole."""
    measures = matrix.measures() if matrix.is_complete else {}
    found = {
        "tasks": list(matrix.tasks),
        "stages": stages_of(matrix),
        "accuracy": [[row[task] for task in matrix.tasks] for row in matrix.rows],
        "measures": measures,
    }
    write_atomically(folder / DATA, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    lines = ["# Accuracy by stage and task", "", f"| | {' | '.join(matrix.tasks)} | mean |"]
    lines.append(f"|---|{'---|' * (len(matrix.tasks) + 1)}")
    for place, (name, row) in enumerate(zip(stages_of(matrix), matrix.rows, strict=True)):
        cells = [f"{row[task]:.3f}" for task in matrix.tasks]
        lines.append(f"| {name} | {' | '.join(cells)} | {matrix.average_accuracy(place):.3f} |")
    lines += ["", f"![the matrix, and each task over the stages]({PICTURE})", ""]
    lines += [f"- {MEANS[name]}: {value:.3f}" for name, value in measures.items()]
    write_atomically(folder / PAGE, "\n".join(lines) + "\n")
    draft = draft_of(folder / PICTURE)
    draw(matrix, draft)
    draft.replace(folder / PICTURE)


def draw(matrix: AccuracyMatrix, file: Path) -> None:
    """The matrix as a map, and beside it the accuracy of each task over the stages; dots mark a task's own stage."""
    import matplotlib
    from matplotlib.figure import Figure

    from selfdistill.comparison.drawing import COLOURS, INK, PAPER, STYLE

    tasks, stages = list(matrix.tasks), stages_of(matrix)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.imshow([[row[task] for task in tasks] for row in matrix.rows], vmin=0, vmax=1, cmap="Blues", aspect="auto")
        left.grid(False)
        left.set_title("accuracy by stage and task")
        left.set_xticks(range(len(tasks)), tasks)
        left.set_yticks(range(len(stages)), stages)
        for y, row in enumerate(matrix.rows):
            for x, task in enumerate(tasks):
                colour = PAPER if row[task] > 0.55 else INK
                weight = "bold" if y == x + 1 else "normal"
                left.text(x, y, f"{row[task]:.2f}", ha="center", va="center", color=colour, weight=weight)
        right.set_title("each task over the stages")
        for number, task in enumerate(tasks):
            colour, values = COLOURS[number % len(COLOURS)], [row[task] for row in matrix.rows]
            right.plot(range(len(stages)), values, color=colour, label=task, lw=1.8)
            if number + 1 < len(stages):
                right.plot([number + 1], [values[number + 1]], "o", color=colour, ms=7)
        right.set_ylim(-0.03, 1.03)
        right.set_xticks(range(len(stages)), [name.removeprefix("after ") for name in stages])
        right.legend(frameon=False, fontsize=7.5)
        figure.savefig(file, dpi=130, format="png")
