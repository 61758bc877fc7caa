"""SDPO with feedback: code that fails its tests learns from what the tests said, or from a peer that passed them.

    python experiments/examples/sdpo_rich_feedback.py --allow-code-execution
    python experiments/examples/sdpo_rich_feedback.py --allow-code-execution --model Qwen/Qwen2.5-Coder-0.5B-Instruct

The model's code is run in a sandbox (bubblewrap), or without one where --unsandboxed says so; therefore the flags. By
default the embedded model on a CPU, which shows the mechanism and will not learn to program.
"""

import argparse
import sys

from datasets import Dataset
from trl import GRPOConfig

from selfdistill import Distillation, SelfDistillTrainer, Teacher
from selfdistill.models.loading import load_model
from selfdistill.rewards import PythonTests
from selfdistill.teachers.context import Feedback
from selfdistill.teachers.weights import Ema

PROBLEMS = [
    ("Write a function double(x).", ["assert double(2) == 4", "assert double(-1) == -2"]),
    ("Write a function is_even(n).", ["assert is_even(4)", "assert not is_even(7)"]),
    ("Write a function last(items).", ["assert last([1, 2, 3]) == 3", "assert last('ab') == 'b'"]),
    ("Write a function shout(text).", ["assert shout('hey') == 'HEY'"]),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="a hub name, a folder, or embedded")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", default="outputs/sdpo_rich_feedback")
    parser.add_argument("--allow-code-execution", action="store_true")
    parser.add_argument("--unsandboxed", action="store_true")
    options = parser.parse_args()
    if not options.allow_code_execution:
        sys.exit("This example runs code that a model wrote. Add --allow-code-execution if that is what you want.")
    embedded = options.model == "embedded"
    model, tokenizer = load_model(name=options.model, tuning="full")
    args = GRPOConfig(
        output_dir=options.output,
        max_steps=options.steps,
        num_generations=4,
        per_device_train_batch_size=8,
        max_completion_length=24 if embedded else 512,
        learning_rate=1e-4 if embedded else 1e-6,
        lr_scheduler_type="constant",
        gradient_checkpointing=not embedded,
        bf16=False if embedded else None,
        use_cpu=embedded,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    seen: list = []
    trainer = SelfDistillTrainer(
        model=model,
        args=args,
        reward_funcs=[PythonTests(allow_code_execution="unsandboxed" if options.unsandboxed else True)],
        teacher=Teacher(Ema(rate=0.01), Feedback()),
        distillation=Distillation(alpha=1.0, top_k=20),
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": text}], "tests": tests} for text, tests in PROBLEMS]
        ),
        processing_class=tokenizer,
        on_rollouts=lambda rollouts, tensors: seen.append(rollouts),
    )
    trainer.train()
    rollouts = seen[-1]
    print("\nthe last first rollout:", rollouts.completions[0])
    print("what the tests said:", rollouts.feedback[0])
    print("what the teacher was shown:", rollouts.teacher_prompts[0])
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
