"""Draws what a run prints: docs/images/run.svg, from a run of the embedded model that takes half a minute.

python experiments/run_picture.py
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
WIDTH = 100
COMMAND = ["experiment=sdpo", "max_steps=12", "hardware=cpu", "eval.every=4", "show.completions_every=0"]
TITLES = re.compile(r"(differs from the defaults|plan|training|completions at step \d+|before and after|where .*)\s*")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "selfdistill.train", *COMMAND], cwd=folder, stdout=subprocess.PIPE, text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(WIDTH), "WANDB_API_KEY": ""},
        )  # fmt: skip
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), highlight=False)  # noqa: SIM115
    console.print(Text(f"$ python -m selfdistill.train {' '.join(COMMAND)}", style="bold green"))
    for line in done.stdout.splitlines():
        style = "bold" if TITLES.fullmatch(line) or line.split()[:2] == ["step", "reward"] else ""
        console.print(Text(line.rstrip(), style="cyan" if line.startswith("evaluation") else style))
    target = ROOT / "docs" / "images" / "run.svg"
    target.parent.mkdir(exist_ok=True)
    console.save_svg(str(target), title="selfdistill")
    print(target.relative_to(ROOT))


if __name__ == "__main__":
    main()
