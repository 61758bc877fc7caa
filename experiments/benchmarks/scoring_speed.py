"""How much faster `inverse_loss` scores a batch of completions than one forward pass each does.

    OMP_NUM_THREADS=2 python experiments/benchmarks/scoring_speed.py --out experiments/benchmarks/scoring_speed.json

Samples the completions from the embedded model, scores them both ways in alternation, checks that the scores agree, and
prints the ratio of the median times.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))

from selfdistill.rewards import InverseLoss, PolicyScorer

PACKAGE = Path(str(files("selfdistill")))


@torch.no_grad()
def rollouts(model, tokenizer, prompts: int, generations: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompt and completion ids, sampled at temperature 1, EOS included where it was emitted."""
    lines = (PACKAGE / "data" / "embedded" / "half_known_train.jsonl").read_text().splitlines()[:prompts]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": json.loads(line)["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        for line in lines
        for _ in range(generations)
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    output = model.generate(**inputs, max_new_tokens=32, do_sample=True)[:, inputs["input_ids"].shape[1] :].tolist()
    eos = tokenizer.eos_token_id
    completions = [row[: row.index(eos) + 1] if eos in row else row for row in output]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts], completions


@torch.no_grad()
def one_forward_pass_each(model, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list[float]:
    """The plain way: every completion by itself, log-softmax over its positions, mean."""
    scores = []
    for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])
        scores.append(logprobs.mean().item())
    return scores


def timed(function: Callable[[], list[float]]) -> tuple[float, list[float]]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    folder = PACKAGE / "models" / "embedded"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    prompt_ids, completion_ids = rollouts(model, tokenizer, arguments.prompts, arguments.generations)

    reward = InverseLoss()
    reward.bind(PolicyScorer(model, tokenizer, micro_batch_tokens=arguments.micro_batch_tokens))
    texts = [""] * len(prompt_ids)
    logprobs = reward.scorer.token_logprobs(prompt_ids, completion_ids)
    call = {"prompts": texts, "completions": texts, "prompt_ids": prompt_ids, "completion_ids": completion_ids}
    ways: dict[str, Callable[[], list[float]]] = {
        "one_forward_pass_each": lambda: one_forward_pass_each(model, prompt_ids, completion_ids),
        "inverse_loss": lambda: reward(**call),
        "inverse_loss_with_policy_logprobs": lambda: reward(**call, policy_logprobs=logprobs),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    scores = {}
    for repeat in range(arguments.repeats + 1):  # the first round warms up
        for name, way in ways.items():
            seconds, scores[name] = timed(way)
            if repeat:
                times[name].append(seconds)
    # A completion that is EOS alone is not scorable by inverse_loss.
    pairs = zip(*scores.values(), strict=True)
    difference = max(max(row) - min(row) for row in pairs if None not in row)
    assert difference < 1e-4, f"the scores differ by {difference}"
    median_s = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "completions": len(completion_ids),
        "prompt_tokens": sum(map(len, prompt_ids)),
        "completion_tokens": sum(map(len, completion_ids)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "micro_batch_tokens": arguments.micro_batch_tokens,
        "median_s": {name: round(seconds, 5) for name, seconds in median_s.items()},
        "largest_difference": difference,
        "times_faster": round(median_s["one_forward_pass_each"] / median_s["inverse_loss"], 2),
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
