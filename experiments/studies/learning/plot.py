"""Draws results.csv: accuracy on the new skill against retention of the old ones, a mark a seed.

python experiments/studies/learning/plot.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

FOLDER = Path(__file__).parent
COLUMNS = 3


def main() -> None:
    results = pd.read_csv(FOLDER / "results.csv")
    results["task"] = results.row.str.split(":").str[0]
    results["method"] = results.row.str.split(": ").str[1]
    tasks = list(dict.fromkeys(results.task))
    lines = -(-len(tasks) // COLUMNS)
    figure, axes = plt.subplots(lines, COLUMNS, figsize=(5.4 * COLUMNS, 6.2 * lines), squeeze=False)
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    for axis, task in zip(axes.flat, tasks, strict=False):
        rows = results[results.task == task]
        colours = plt.get_cmap("tab20")
        for i, (method, group) in enumerate(rows.groupby("method", sort=False)):
            axis.scatter(
                group.accuracy_after,
                group.retention_after,
                s=34,
                color=colours(i % 20),
                label=method,
                marker="os^Dv"[i % 5],
            )
        axis.axhline(rows.retention_before.mean(), color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=f"new skill: {task}", xlabel="held-out accuracy on the new skill")
        axis.margins(0.12)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    for axis in axes[:, 0]:
        axis.set_ylabel("mean retention of the old skills (dotted: before); scales differ")
    figure.tight_layout()
    figure.savefig(FOLDER / "new_skill_against_retention.png", dpi=130)


if __name__ == "__main__":
    main()
