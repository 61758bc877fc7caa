"""Runs the rows of a study, each through the program's own command, and collects what the runs' folders say.

    python experiments/studies/runner.py experiments/studies/learning --jobs 2

A study is a folder with `study.yaml`: `common` overrides, `seeds`, and `rows` (name -> overrides). Finished runs are
kept in `--runs` and not repeated; the results go to `results.csv` and, as a table, `results.md` in the study's folder.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import yaml
from rich.console import Console
from rich.progress import track

LONGEST_NAME = 60  # of a run; the rest is cut off


def run(job: tuple[str, int, list[str], Path, bool]) -> dict | None:
    """One row and seed; returns its line of results, None where nothing is to be run and nothing has been."""
    name, seed, overrides, folder, collect = job
    key = re.sub(r"[^A-Za-z0-9.]+", "-", f"{name}-seed{seed}")
    if len(key) > LONGEST_NAME:
        raise SystemExit(f"row {name!r}: its runs' folders would be cut to {LONGEST_NAME} characters; shorten the name")
    done = [
        p.parent
        for p in folder.glob(f"*[0-9]-{key}-*/summary.json")
        if json.loads(p.read_text())["status"] in ("finished", "stopped")
    ]
    if not done and collect:
        return None
    if not done:
        command = [
            sys.executable,
            "-m",
            "selfdistill.train",
            *overrides,
            f"seed={seed}",
            f"name={key}",
            f"output_dir={folder}",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            return {"row": name, "seed": seed, "status": f"failed: {result.stderr.strip().splitlines()[-1]}"}
        done = sorted(folder.glob(f"*[0-9]-{key}-*"))
    summary = json.loads((done[-1] / "summary.json").read_text())
    metrics = [json.loads(line) for line in (done[-1] / "metrics.jsonl").read_text().splitlines()]
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    steps = [m for m in metrics if "reward" in m or "loss" in m]
    line = {
        "row": name,
        "seed": seed,
        "status": summary["status"],
        "steps": summary["step"],
        "wall_s": round(summary["wall_s"]),
    }
    for metric in ("accuracy", "retention", "forgetting"):
        for when, values in (("before", before), ("after", after)):
            if f"eval/{metric}" in values:
                line[f"{metric}_{when}"] = round(values[f"eval/{metric}"], 4)
    for metric in ("reward", "monitor/repetition", "monitor/entropy", "kl"):
        values = [m[metric] for m in steps if m.get(metric) is not None]
        if values:
            tail = max(1, len(values) // 10)
            line[f"{metric}_first"] = round(sum(values[:tail]) / tail, 4)
            line[f"{metric}_last"] = round(sum(values[-tail:]) / tail, 4)
    line["alarms"] = ";".join(f"{a['monitor']}@{a['step']}" for a in summary.get("alarms", []))
    return line


def by_seed(table: pd.DataFrame, order: list[str]) -> str:
    """A Markdown table: a line a row, every seed shown, and the mean over seeds."""
    lines = [
        "| row | accuracy before | accuracy after, by seed | mean "
        "| retention before | retention after, by seed | mean | s a run |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name in order:
        rows = table[table.row == name]
        if rows.empty or "accuracy_after" not in rows:
            continue

        def seeds(column: str, rows: pd.DataFrame = rows) -> str:
            return " ".join(f"{value:.3f}" for value in rows[column])

        def mean(column: str, rows: pd.DataFrame = rows) -> str:
            return f"{rows[column].mean():.3f}"

        cells = [
            name,
            mean("accuracy_before"),
            seeds("accuracy_after"),
            mean("accuracy_after"),
            mean("retention_before"),
        ]
        cells += [seeds("retention_after"), mean("retention_after"), f"{rows.wall_s.median():.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("outputs/studies"))
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--only", nargs="*", help="rows to run; all without")
    parser.add_argument("--seeds", nargs="*", type=int, help="seeds to run; the study's without")
    parser.add_argument("--collect", action="store_true", help="run nothing, gather what has finished")
    arguments = parser.parse_args()
    study = yaml.safe_load((arguments.study / "study.yaml").read_text())
    folder = (arguments.runs / arguments.study.name).resolve()
    jobs = [
        (name, seed, [*study.get("common", []), *overrides], folder, arguments.collect)
        for seed in arguments.seeds or study["seeds"]
        for name, overrides in study["rows"].items()
        if not arguments.only or name in arguments.only
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        lines = list(
            track(pool.map(run, jobs), total=len(jobs), description=arguments.study.name, console=Console(stderr=True))
        )
    order = list(study["rows"])
    order = list(study["rows"])
    table = pd.DataFrame([line for line in lines if line])
    table = table.sort_values(
        ["row", "seed"], key=lambda column: column.map(order.index) if column.name == "row" else column
    )
    file = arguments.study / "results.csv"
    table.to_csv(file, index=False)
    (arguments.study / "results.md").write_text(by_seed(table, order))
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
