"""Builds the embedded model from nothing: tokenizer, chat template, weights and the build log.

    python experiments/embedded_model/build.py --out first
    python experiments/embedded_model/build.py --start first --out selfdistill/models/embedded \
        --steps 1800 --learning-rate 1e-3 --seed 1 --threads 1

About an hour on two cores for both. The same seed, threads and versions give the same weights. The log holds one entry
a run, with losses and exams.
"""

import argparse
import json
import math
import os
import platform
import random
import sys
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import world  # noqa: E402

from selfdistill.teachers import templates  # noqa: E402

SPECIAL = ["<|pad|>", "<|unk|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MAX_TOKENS = 320


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character and newline, plus the special tokens."""
    characters = ["\n", *(chr(c) for c in range(32, 127))]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", unk_token="<|unk|>", eos_token="<|end|>",
        additional_special_tokens=SPECIAL[3:], model_max_length=1024, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(vocabulary_size: int, hidden: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocabulary_size, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=4,
        num_attention_heads=hidden // 32, num_key_value_heads=max(1, hidden // 64), head_dim=32,
        max_position_embeddings=1024, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=2, bos_token_id=None, attention_dropout=0.0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def encode(example: world.Example | str, ids: dict[str, int]) -> tuple[list[int], list[int]]:
    """Token ids and the labels of the tokens that count: the last answer, or all of a raw text."""
    if isinstance(example, str):
        tokens = [ids[c] for c in example] + [ids["<|end|>"]]
        return tokens, tokens
    turns = [("system", example.system)] if example.system else []
    for question, answer in example.history:
        turns += [("user", question), ("assistant", answer)]
    turns.append(("user", example.prompt))
    context = []
    for role, text in turns:
        context += [ids[f"<|{role}|>"], *(ids[c] for c in text), ids["<|end|>"]]
    context.append(ids["<|assistant|>"])
    target = [*(ids[c] for c in example.response), ids["<|end|>"]]
    return context + target, [-100] * len(context) + target


def batches(rng: random.Random, ids: dict[str, int], size: int):
    """Endless batches of similar lengths, so that little is padding."""
    while True:
        pool = [encode(world.training_example(rng), ids) for _ in range(size * 32)]
        pool = sorted((p for p in pool if len(p[0]) <= MAX_TOKENS), key=lambda p: len(p[0]))
        groups = [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
        rng.shuffle(groups)
        for group in groups:
            longest = max(len(tokens) for tokens, _ in group)
            yield (
                torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in group]),
                torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in group]),
            )


@torch.no_grad()
def accuracy(model, tokenizer, examples: list[world.Example]) -> float:
    """Share of greedy answers that equal the expected ones."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": e.prompt}], tokenize=False, add_generation_prompt=True
        )
        for e in examples
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(a == e.response for a, e in zip(answers, examples, strict=True)) / len(examples)


def exam(model, tokenizer, count: int) -> dict[str, float]:
    """What the model can do on held-out words: alone, and with help in its context."""
    model.eval()
    rng = random.Random(1_000_003)
    alone = {**world.KNOWN, "pick": world.pick, "near": world.near, "far": world.far}
    results = {}
    for name, skill in alone.items():
        results[name] = accuracy(model, tokenizer, [skill(rng, held_out=True) for _ in range(count)])
    helped = {"pick": world.pick, "near": world.near, "far": world.far}
    for name, skill in helped.items():
        for context in ("demonstration", "foreign_demonstration", "peer", "feedback"):
            examples = []
            for _ in range(count):
                e = skill(rng, held_out=True)
                if context == "demonstration":
                    prompt = templates.DEMONSTRATION.format(prompt=e.prompt, demonstration=e.response)
                elif context == "foreign_demonstration":
                    shown = world.OTHER_STYLES[0].format(e.response)
                    prompt = templates.DEMONSTRATION.format(prompt=e.prompt, demonstration=shown)
                else:
                    told = world.FEEDBACK_WITH_ANSWER.format(completion="xyz", answer=e.response)
                    prompt = templates.FEEDBACK.format(
                        prompt=e.prompt,
                        solution=templates.SOLUTION_BLOCK.format(solution=e.response) if context == "peer" else "",
                        feedback=templates.FEEDBACK_BLOCK.format(feedback=told) if context == "feedback" else "",
                    )
                examples.append(world.Example(prompt, e.response))
            results[f"{name}_with_{context}"] = accuracy(model, tokenizer, examples)
    model.train()
    return {name: round(value, 4) for name, value in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="go on from these weights, with a schedule of its own")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), arguments.hidden)
    earlier = []
    if arguments.start:
        model = Qwen3ForCausalLM.from_pretrained(arguments.start)
        earlier = json.loads((arguments.start / "build_log.json").read_text())
        earlier = earlier if isinstance(earlier, list) else [earlier]
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    source = batches(random.Random(arguments.seed), tokenizer.get_vocab(), arguments.batch)
    arguments.out.mkdir(parents=True, exist_ok=True)
    log = {
        "command": {key: str(value) for key, value in vars(arguments).items() if key not in ("out", "start")},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "losses": [],
        "exams": [],
    }
    start, losses = time.time(), []
    for step in range(1, arguments.steps + 1):
        progress = step / arguments.steps
        scale = min(1.0, step / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * scale
        tokens, labels = next(source)
        # Padding stands on the right, where a causal model never looks: no mask, and the faster attention.
        hidden = model.model(tokens).last_hidden_state[:, :-1]
        wanted = labels[:, 1:]
        keep = wanted != -100
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[keep]), wanted[keep])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0:
            mean = sum(losses[-100:]) / 100
            log["losses"].append({"step": step, "loss": round(mean, 4), "wall_s": round(time.time() - start)})
            print(f"step {step} loss {mean:.4f} {time.time() - start:.0f} s", flush=True)
        if step % 700 == 0 or step == arguments.steps:
            results = exam(model, tokenizer, 200 if step == arguments.steps else 60)
            log["exams"].append({"step": step, **results})
            print(json.dumps(results), flush=True)
            model.save_pretrained(arguments.out)
            tokenizer.save_pretrained(arguments.out)
            (arguments.out / "build_log.json").write_text(json.dumps([*earlier, log], indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
