"""Writes the data of the embedded model's world: what is trained on, what is evaluated, and what must not be forgotten.

    python experiments/embedded_model/make_data.py --out selfdistill/data/embedded

The same seed gives the same files. Evaluation words are the held-out half of the world, which training never uses.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import world  # noqa: E402

ROWS = {"train": 400, "eval": 200}
TEXT_ROWS = {"train": 300, "eval": 100}
RETENTION_ROWS = 100
# What a text's prompt is cut to in conf/data/text.yaml; texts differ within this many characters.
TEXT_PROMPT_TOKENS = 24
# Draws without a new prompt after which a skill counts as exhausted: `spell` has one prompt a word.
PATIENCE = 2000


def distinct(draw: Callable[[], world.Example], rows: int, taken: set[str]) -> Iterator[world.Example]:
    """Up to `rows` examples whose prompts are not in `taken`, which grows."""
    misses = 0
    while rows and misses < PATIENCE:
        example = draw()
        if example.prompt in taken:
            misses += 1
            continue
        taken.add(example.prompt)
        rows, misses = rows - 1, 0
        yield example


def row(example: world.Example, number: int, name: str, style: str = world.OWN_STYLE) -> dict[str, object]:
    return {
        "id": f"{name}-{number:04d}",
        "prompt": example.prompt,
        "answer": example.response,
        "golden_response": [style.format(example.response)],
    }


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    print(f"{path}: {len(rows)} rows")


def skill_files(out: Path, name: str, skill: Callable[..., world.Example], seed: int, foreign: bool) -> None:
    """NAME_train and NAME_eval; with `foreign` also the training rows with demonstrations in another author's words."""
    taken: set[str] = set()
    for split in ("train", "eval"):
        rng = random.Random(f"{seed} {name} {split}")
        drawn = list(distinct(lambda rng=rng, split=split: skill(rng, held_out=split == "eval"), ROWS[split], taken))
        write(out / f"{name}_{split}.jsonl", [row(e, i, f"{name}-{split}") for i, e in enumerate(drawn)])
        if foreign and split == "train":
            style = world.OTHER_STYLES[0]
            rows = [row(e, i, f"{name}-foreign-{split}", style) for i, e in enumerate(drawn)]
            write(out / f"{name}_foreign_{split}.jsonl", rows)


def text_files(out: Path, seed: int) -> None:
    """Raw text of two or three sentences, without questions or answers."""
    beginnings: set[str] = set()
    for split, count in TEXT_ROWS.items():
        rng = random.Random(f"{seed} text {split}")
        rows: list[dict[str, object]] = []
        while len(rows) < count:
            text = " ".join(world.sentence(rng) for _ in range(rng.randint(2, 3)))
            if text[:TEXT_PROMPT_TOKENS] not in beginnings:
                beginnings.add(text[:TEXT_PROMPT_TOKENS])
                rows.append({"id": f"text-{split}-{len(rows):04d}", "text": text})
        write(out / f"text_{split}.jsonl", rows)


def retention_file(out: Path, seed: int) -> None:
    """Held-out questions of every old skill, one suite a skill."""
    rows = []
    taken: set[str] = set()
    for name, skill in world.KNOWN.items():
        rng = random.Random(f"{seed} retention {name}")
        drawn = distinct(lambda rng=rng, skill=skill: skill(rng, held_out=True), RETENTION_ROWS, taken)
        rows += [{**row(example, i, name), "suite": name} for i, example in enumerate(drawn)]
    write(out / "retention.jsonl", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    skill_files(arguments.out, "half_known", world.pick, arguments.seed, foreign=False)
    skill_files(arguments.out, "near", world.near, arguments.seed, foreign=True)
    skill_files(arguments.out, "far", world.far, arguments.seed, foreign=True)
    skill_files(arguments.out, "first_word", world.first_word, arguments.seed, foreign=False)
    skill_files(arguments.out, "long_sort", world.long_sort, arguments.seed, foreign=False)
    text_files(arguments.out, arguments.seed)
    retention_file(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
