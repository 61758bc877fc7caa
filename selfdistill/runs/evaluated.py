"""evaluation.jsonl: what a model answered to each row of an evaluation, and how that was judged.

One JSON object a row: step, suite (null for the new task), row (its id), prompt, answer, verdict (the score, or null).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfdistill.evaluation.evaluator import Item
from selfdistill.files import write_atomically
from selfdistill.rewards.base import shorten
from selfdistill.rollout import Prompt

EVALUATION = "evaluation.jsonl"
CHARACTERS = 2000  # of a prompt, and of an answer
MOST_BYTES = 16 * 2**20


def write_items(path: Path, step: int, items: Sequence[Item], *, most_bytes: int = MOST_BYTES) -> None:
    """Adds the rows of the evaluation after `step`; the file is replaced as a whole.

    What it has of this step and of later ones, which a resumed run repeats, is dropped. So are the oldest evaluations
    once the file would become larger than `most_bytes`, but the first, which the others are compared with.
    """
    steps: dict[int, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
        earlier = json.loads(line)["step"]
        if earlier < step:
            steps[earlier] = steps.get(earlier, "") + line
    steps[step] = "".join(f"{json.dumps(_line(step, item), ensure_ascii=False)}\n" for item in items)
    first, *others = steps
    while len(others) > 1 and sum(len(text.encode()) for text in steps.values()) > most_bytes:
        del steps[others.pop(0)]
    write_atomically(path, "".join(steps.values()))


def _line(step: int, item: Item) -> dict[str, Any]:
    return {
        "step": step,
        "suite": item.suite,
        "row": item.row,
        "prompt": shorten(_text(item.prompt), CHARACTERS),
        "answer": shorten(item.answer, CHARACTERS),
        "verdict": item.verdict,
    }


def _text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(str(message["content"]) for message in prompt)
