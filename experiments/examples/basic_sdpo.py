"""SDPO without environment feedback: a rollout that failed learns from a peer that succeeded.

    python experiments/examples/basic_sdpo.py
    python experiments/examples/basic_sdpo.py --model Qwen/Qwen2.5-0.5B-Instruct --data my.jsonl --steps 200

By default the embedded model (0.8 million parameters) on a CPU, and a skill that it half knows. A file of your own has
one {"prompt": …, "answer": …} a line.
"""

import argparse
import json
from importlib import resources
from pathlib import Path

import torch
from datasets import Dataset
from trl import GRPOConfig

from selfdistill import Distillation, SelfDistillTrainer, Teacher
from selfdistill.models.loading import load_model
from selfdistill.teachers.context import Feedback
from selfdistill.teachers.weights import Ema


def exact(completions: list, answer: list[str], **_: object) -> list[float]:
    """1 for the right answer, else 0."""
    return [float(c[0]["content"].strip() == a) for c, a in zip(completions, answer, strict=True)]


def rows(path: str | None) -> Dataset:
    """Questions as messages, each with its answer."""
    file = resources.files("selfdistill.data") / "embedded" / "half_known_train.jsonl"
    text = Path(path).read_text(encoding="utf-8") if path else file.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": line["prompt"]}], "answer": line["answer"]} for line in lines]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="a hub name, a folder, or embedded")
    parser.add_argument("--data", help="a JSONL file with prompt and answer")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", default="outputs/basic_sdpo")
    options = parser.parse_args()
    embedded, cpu = options.model == "embedded", not torch.cuda.is_available()
    model, tokenizer = load_model(name=options.model, tuning="full")
    args = GRPOConfig(
        output_dir=options.output,
        max_steps=options.steps,
        num_generations=8,
        per_device_train_batch_size=32 if embedded else 8,
        max_completion_length=24 if embedded else 256,
        learning_rate=3e-4 if embedded else 1e-5,
        lr_scheduler_type="constant",
        gradient_checkpointing=not embedded,
        bf16=False if embedded or cpu else None,
        use_cpu=embedded or cpu,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    trainer = SelfDistillTrainer(
        model=model,
        args=args,
        reward_funcs=[exact],
        teacher=Teacher(Ema(rate=0.05), Feedback(use_feedback=False)),
        distillation=Distillation(alpha=0.5, top_k=100),
        train_dataset=rows(options.data),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(options.output)
    print(f"the model is in {options.output}")


if __name__ == "__main__":
    main()
