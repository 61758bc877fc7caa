"""How much of a step's passes is padding, and what it costs, before and after it is taken out.

    OMP_NUM_THREADS=1 python experiments/benchmarks/padding.py [--data FILE] [--rows-at-once 8] [--hidden 256]

Prompts are as long as those of a file of real questions, a token for every four characters; each is sampled for several
times, and completions end anywhere between a sixteenth of the limit and the limit, evenly. They are padded, shuffled
and cut into micro-batches as TRL does it. The teacher sees the prompt and a demonstration as long as another
completion. Counted are the tokens of all passes of a step, and timed are the student's forward and backward pass and
the teacher's forward pass through a random Qwen3 model: as TRL pads the student's pass and as the teacher's went
through in one pass a micro-batch, and with rows sorted by length and passes in groups. Both are repeated in turn, and
medians are compared. The last line is what a further pass costs, in tokens.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import split_tensor_dict

from selfdistill.models.row_groups import row_groups
from selfdistill.training.micro_batches import sorted_by_length

DATA = Path(__file__).parents[2] / "tests/fixtures/data/chemistry_train.jsonl"
CHARACTERS_PER_TOKEN = 4


def prompt_lengths(file: Path) -> list[int]:
    text = file.read_text(encoding="utf-8")
    rows = json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    return [len(row["prompt"] + row.get("system", "")) // CHARACTERS_PER_TOKEN for row in rows]


def masks(lengths: list[int], side: str) -> Tensor:
    ones = [torch.ones(length, dtype=torch.long) for length in lengths]
    return pad_sequence(ones, batch_first=True, padding_side=side)


def rollouts(file: Path, prompts: int, generations: int, limit: int, seed: int) -> dict[str, Tensor]:
    """The masks of what is sampled together, in shuffled order."""
    draw = random.Random(seed)
    chosen = [length for length in draw.sample(prompt_lengths(file), prompts) for _ in range(generations)]
    draw.shuffle(chosen)
    completions = [draw.randint(max(1, limit // 16), limit) for _ in chosen]
    shown = [length + draw.randint(max(1, limit // 16), limit) for length in chosen]
    completion = masks(completions, "right")
    return {
        "prompt_mask": masks(chosen, "left"),
        "completion_mask": completion,
        "distill_mask": completion.bool(),
        "teacher_prompt_mask": masks(shown, "left"),
    }


Sizes = list[tuple[int, int]]  # rows and columns of each pass


def student_passes(batches: list[dict[str, Tensor]]) -> Sizes:
    groups = [g for batch in batches for g in row_groups(batch["prompt_mask"], batch["completion_mask"])]
    return [(len(g.rows), g.prompt_tokens + g.completion_tokens) for g in groups]


def teacher_passes(batches: list[dict[str, Tensor]]) -> Sizes:
    found = []
    for batch in batches:
        both = torch.cat([batch["teacher_prompt_mask"], batch["completion_mask"]], dim=1)
        found += [(len(g.rows), g.prompt_tokens) for g in row_groups(both, both[:, :0])]
    return found


def whole(batches: list[dict[str, Tensor]], prompt: str) -> Sizes:
    """As TRL pads: every micro-batch to the longest of all."""
    return [(len(b[prompt]), b[prompt].size(1) + b["completion_mask"].size(1)) for b in batches]


def packed(batches: list[dict[str, Tensor]], prompt: str) -> Sizes:
    """One pass a micro-batch, with all padding behind the rows and no column that is padding in all."""
    return [(len(b[prompt]), int((b[prompt].sum(1) + b["completion_mask"].sum(1)).max())) for b in batches]


def tokens(sizes: Sizes) -> int:
    return sum(rows * columns for rows, columns in sizes)


def model_of(hidden: int, layers: int) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=1000, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).model


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def pass_through(model: Any, sizes: Sizes, *, learn: bool) -> None:
    with torch.set_grad_enabled(learn):
        for rows, columns in sizes:
            ids, mask = torch.zeros(rows, columns, dtype=torch.long), torch.ones(rows, columns, dtype=torch.long)
            mask[0, -1] = 0  # so that the mask is not left out
            hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            if learn:
                hidden.sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--rows-at-once", type=int, default=8)
    parser.add_argument("--completion-tokens", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()

    drawn = [
        rollouts(given.data, given.prompts, given.generations, given.completion_tokens, seed) for seed in range(20)
    ]
    count = given.prompts * given.generations // given.rows_at_once
    steps = [split_tensor_dict(step, count) for step in drawn]
    ordered = [sorted_by_length(step, count, whole=True) for step in steps]
    print("| pass | tokens that count | padding before | padding now |\n|---|---|---|---|")
    plans: dict[str, tuple[list[Sizes], list[Sizes]]] = {
        "the student's": ([whole(s, "prompt_mask") for s in steps], [student_passes(s) for s in ordered]),
        "the teacher's": ([packed(s, "teacher_prompt_mask") for s in steps], [teacher_passes(s) for s in ordered]),
    }
    for name, (before, now) in plans.items():
        prompt = "prompt_mask" if "student" in name else "teacher_prompt_mask"
        real = sum(int(step[prompt].sum() + step["completion_mask"].sum()) for step in drawn)
        shares = (f"{1 - real / sum(map(tokens, sizes)):.0%}" for sizes in (before, now))
        print(f"| {name} | {real / len(drawn):,.0f} | {' | '.join(shares)} |")

    model = model_of(given.hidden, given.layers)
    pass_through(model, [(2, 64)], learn=True)
    print("\n| pass | s before | s now | now / before |\n|---|---|---|---|")
    for name, (before, now) in plans.items():
        learn = "student" in name
        rounds = [(before[i], now[i]) for i in range(given.rounds)]
        times = [[seconds(partial(pass_through, model, sizes, learn=learn)) for sizes in pair] for pair in rounds]
        was, is_ = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {was:.2f} | {is_:.2f} | {is_ / was:.2f} |")

    one, many = (
        min(seconds(partial(pass_through, model, sizes, learn=False)) for _ in range(5))
        for sizes in ([(8, 128)], [(1, 128)] * 8)
    )
    print(f"\na further pass costs as much as {(many - one) / 7 / (one / 1024):.0f} tokens")


if __name__ == "__main__":
    main()
