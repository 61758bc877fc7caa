"""What the study's sweep found: results.csv, matrices.png, and the tables and sentences of the page.

    python experiments/studies/continual/summarise.py outputs/studies/continual

`make study NAME=continual` does so at its end.

Of sequences that a sweep has not finished nothing is taken.
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from selfdistill.comparison import compare, load_runs
from selfdistill.comparison.drawing import INK, PAPER, STYLE
from selfdistill.comparison.wording import sentence

HERE = Path(__file__).parent
METHODS = {"study_sft": "SFT", "study_sdft": "SDFT", "study_grpo": "GRPO", "study_sdpo_feedback": "SDPO with feedback"}
MEASURES = {
    "eval/accuracy": "average accuracy",
    "eval/learned": "learned",
    "eval/backward_transfer": "backward transfer",
    "eval/forward_transfer": "forward transfer",
    "eval/task_forgetting": "forgetting",
    "eval/forgetting": "old skills lost",
}
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    sweep = parser.parse_args().sweep
    found = load_runs(sweep)
    done = found.runs[found.runs["status"] == "finished"]
    rows = []
    for folder, run in done.iterrows():
        report = json.loads((Path(str(folder)) / "sequence.json").read_text())
        method = str(found.configs.loc[folder, "experiment"])
        row = {
            "method": method,
            "seed": run["seed"],
            "wall_s": round(run["wall_s"]),
            **{name: run[name] for name in MEASURES},
        }
        for stage, accuracies in zip(report["stages"], report["accuracy"], strict=True):
            row |= {f"{stage}: {task}": value for task, value in zip(report["tasks"], accuracies, strict=True)}
        rows.append(row)
    table = pd.DataFrame(rows).sort_values(["method", "seed"], key=_in_order)
    table.round(4).to_csv(HERE / "results.csv", index=False)
    draw(table, report["tasks"], report["stages"])
    lines = [f"| | seeds | {' | '.join(MEASURES.values())} |", f"|---|---|{'---|' * len(MEASURES)}"]
    for method, runs in table.groupby("method", sort=False):
        cells = [
            f"{' '.join(f'{value:.3f}' for value in runs[name])} (**{runs[name].mean():.3f}**)" for name in MEASURES
        ]
        lines.append(
            f"| {METHODS[str(method)]} | {' '.join(str(int(seed)) for seed in runs['seed'])} | {' | '.join(cells)} |"
        )
    lines.append("")
    for metric in ("eval/task_forgetting", "eval/forgetting", "eval/accuracy"):
        claims = compare(found, metric=metric, baseline="experiment=study_grpo").fields[0].claims
        lines += [f"- {_in_words(sentence(claim))}" for claim in claims if claim.metric == metric]
    page = (HERE / "README.md").read_text()
    written = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n" + "\n".join(lines) + f"\n{END}", page, flags=re.S)
    (HERE / "README.md").write_text(written)
    print("\n".join(lines))


def _in_words(text: str) -> str:
    """A sentence with the names that the page uses."""
    names = {
        ", forgetting:": ", old skills lost:",
        "eval/task_forgetting": "forgetting",
        ", accuracy:": ", average accuracy:",
    }
    names |= {f"experiment={method}": name for method, name in METHODS.items()}
    for theirs, ours in names.items():
        text = text.replace(theirs, ours)
    return text


def _in_order(column: pd.Series) -> pd.Series:
    return column.map(list(METHODS).index) if column.name == "method" else column


def draw(table: pd.DataFrame, tasks: list[str], stages: list[str]) -> None:
    """The mean matrix of each method."""
    methods = [method for method in METHODS if (table["method"] == method).any()]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 2.9), layout="constrained")
        for axes, method in zip(figure.subplots(1, len(methods), sharey=True), methods, strict=True):
            runs = table[table["method"] == method]
            matrix = [[runs[f"{stage}: {task}"].mean() for task in tasks] for stage in stages]
            axes.imshow(matrix, vmin=0, vmax=1, cmap="Blues", aspect="auto")
            for y, row in enumerate(matrix):
                for x, value in enumerate(row):
                    weight = "bold" if y == x + 1 else "normal"
                    colour = PAPER if value > 0.55 else INK
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, weight=weight)
            axes.grid(False)
            axes.set_title(f"{METHODS[method]}, {len(runs)} seeds")
            axes.set_xticks(range(len(tasks)), [task.replace("_", "\n") for task in tasks])
            axes.set_yticks(range(len(stages)), stages)
        figure.savefig(HERE / "matrices.png", dpi=110)


if __name__ == "__main__":
    main()
