"""SDPO on a model that unsloth loads in 4 bit, on one GPU.

    pip install selfdistill[unsloth]
    python experiments/examples/sdpo_with_unsloth.py --model Qwen/Qwen2.5-7B-Instruct --data my.jsonl

Unsloth changes TRL when it is imported, so it comes before everything that imports TRL; selfdistill, which comes next,
puts TRL's trainer back beneath its own. The data has one {"prompt": …, "answer": …} a line.
"""

import argparse
import json
import sys

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What unsloth is called with, apart from the model's name; a test binds these to its signatures where it is installed.
LOADING = {"max_seq_length": 2048, "load_in_4bit": True, "fast_inference": False}
ADAPTER = {"r": 32, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": TARGETS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-7B-Instruct", help="a hub name or a folder")
    parser.add_argument("--data", required=True, help="a JSONL file with prompt and answer")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", default="outputs/sdpo_with_unsloth")
    options = parser.parse_args()
    try:
        from unsloth import FastLanguageModel
    except (ImportError, NotImplementedError) as error:
        sys.exit(
            f"unsloth cannot be used here ({error}). It needs a GPU and the extra: pip install selfdistill[unsloth]. "
            "Without it, run basic_sdpo.py."
        )
    from datasets import Dataset

    from selfdistill import Distillation, SelfDistillTrainer, Teacher
    from selfdistill.rewards import ExactMatch
    from selfdistill.teachers.context import Feedback
    from selfdistill.teachers.weights import Ema
    from selfdistill.training.trl_trainer import GRPOConfig

    with open(options.data, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    model, tokenizer = FastLanguageModel.from_pretrained(options.model, **LOADING)
    model = FastLanguageModel.get_peft_model(model, **ADAPTER)
    trainer = SelfDistillTrainer(
        model=model,
        args=GRPOConfig(
            output_dir=options.output,
            max_steps=options.steps,
            num_generations=8,
            per_device_train_batch_size=8,
            max_completion_length=512,
            learning_rate=1e-5,
            logging_steps=5,
            report_to="none",
        ),
        reward_funcs=[ExactMatch(contains=True, feedback="verdict")],
        teacher=Teacher(Ema(rate=0.05), Feedback()),
        distillation=Distillation(alpha=0.5, top_k=100),
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": line["prompt"]}], "answer": line["answer"]} for line in lines]
        ),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
