"""The memory that `check=true` forecasts, against the peak of the same run on this machine's CPU.

    python experiments/benchmarks/memory_estimate.py [--shapes NAME ...] [--steps 3]

Each shape is a model of random weights in float32, built here, trained in a process of its own by what
`python -m selfdistill.train` builds: completions of full length, since random models seldom end. The resident memory
before anything is loaded is Python with its libraries; what the run takes is the peak (VmHWM) beyond that, and is held
against the forecast without its part `program`. glibc is told to give every large block back when it is freed
(MALLOC_MMAP_THRESHOLD_), so that the peak is what was needed at one time.

Exits with 1 where a forecast is more than 15% off. Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from resident import reset_peak, resident_mb

VOCABULARY = 32_000
TOLERANCE = 0.15


@dataclass(frozen=True)
class Shape:
    """A model, what is trained of it, and how long its texts are."""

    what: str
    hidden: int
    layers: int
    prompt_characters: int
    completion_tokens: int
    overrides: tuple[str, ...]


SHAPES = {
    "full": Shape("full, policy gradient with KL, short completions", 256, 14, 64, 32, (
        "model.tuning=full", "reward=exact_match", "beta=0.04", "completions_per_step=8",
        "hardware.per_device_batch_size=8")),
    "full_ema": Shape("full, distillation from an average, long completions", 512, 8, 128, 192, (
        "model.tuning=full", "reward=none", "teacher=demonstration", "teacher/weights=ema", "beta=0",
        "num_generations=1", "completions_per_step=8", "hardware.per_device_batch_size=4")),
    "lora_ema": Shape("LoRA, distillation from an average, long completions", 768, 8, 128, 160, (
        "model.tuning=lora", "reward=none", "teacher=demonstration", "teacher/weights=ema", "beta=0",
        "num_generations=1", "completions_per_step=8", "hardware.per_device_batch_size=4")),
    "lora": Shape("LoRA, policy gradient with KL, gradient checkpointing, short completions", 1024, 6, 96, 32, (
        "model.tuning=lora", "reward=exact_match", "beta=0.04", "completions_per_step=8",
        "hardware.per_device_batch_size=4", "hardware.gradient_checkpointing=true")),
}  # fmt: skip


def build_model(shape: Shape, folder: Path) -> None:
    """Random weights beside the embedded model's tokenizer; the ids that it lacks cost as much as the others."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(str(files("selfdistill")) + "/models/embedded")
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=shape.hidden, intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers, num_attention_heads=shape.hidden // 64,
        num_key_value_heads=max(1, shape.hidden // 128), head_dim=64, max_position_embeddings=2048,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_data(shape: Shape, file: Path) -> None:
    rows = [
        {"prompt": f"question {i} ".ljust(shape.prompt_characters, "x"), "golden_response": "abc", "answer": "abc"}
        for i in range(64)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measure(shape: Shape, steps: int, folder: Path) -> dict[str, Any]:
    """In a process of its own: the forecast, then the run."""
    from hydra import compose, initialize_config_dir
    from transformers import AutoTokenizer

    from selfdistill import config
    from selfdistill.config.conf import CONF
    from selfdistill.config.targets import make
    from selfdistill.machine.memory_estimate import PROGRAM_CPU_GIB, forecast
    from selfdistill.runs.plan import lengths_of
    from selfdistill.training.build import build, load_data

    model, data = folder / "model", folder / "data.jsonl"
    overrides = [
        "model=local", f"model.name={model}", "data=jsonl", f"data.path={data}", "hardware=cpu", "eval=none",
        "monitors=off", "logger=none", f"max_steps={steps}", "model.dtype=float32",
        f"rollout.max_completion_tokens={shape.completion_tokens}", "training.checkpoint_every=0", *shape.overrides,
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        run = config.check(compose("train", overrides), overrides)
    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = lengths_of(run, tokenizer, load_data(run, tokenizer), make(run.teacher, "teacher"))
    before = resident_mb("VmRSS")
    reset_peak()
    with ExitStack() as at_end:
        parts = build(run, folder / "run", at_end)
        loading = resident_mb("VmHWM")
        reset_peak()
        parts.trainer.train()
        peak = resident_mb("VmHWM")
    found = forecast(run, lengths, on_gpu=False)
    return {
        "parameters": sum(p.numel() for p in parts.trainer.model.parameters()),
        "before_mb": before,
        "loading_mb": loading - before,
        "training_mb": peak - before,
        "forecast_mb": (found.total - PROGRAM_CPU_GIB) * 1024,
        "kept_mb": {name: round(gib * 1024) for name, gib in found.kept.items()},
        "phases_mb": {name: round(gib * 1024) for name, gib in found.phases.items()},
        "lengths": vars(lengths),
    }


def run_shape(name: str, steps: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    try:
        build_model(SHAPES[name], folder / "model")
        write_data(SHAPES[name], folder / "data.jsonl")
        command = [sys.executable, __file__, "--one", name, "--steps", str(steps), "--folder", str(folder)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--one", choices=SHAPES)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(SHAPES[given.one], given.steps, given.folder)))
        return
    missed = []
    print("| shape | parameters | forecast MB | measured MB, CPU | ratio | loading MB | GPU |")
    print("|---|---|---|---|---|---|---|")
    for name in given.shapes:
        found = run_shape(name, given.steps)
        ratio = found["forecast_mb"] / found["training_mb"]
        missed += [name] if abs(ratio - 1) > TOLERANCE else []
        print(
            f"| {SHAPES[name].what} | {found['parameters'] / 1e6:.0f}M | {found['forecast_mb']:,.0f} | "
            f"{found['training_mb']:,.0f} | {ratio:.2f} | {found['loading_mb']:,.0f} | not run |",
            flush=True,
        )
        print(json.dumps(found), file=sys.stderr)
    sys.exit(f"more than {TOLERANCE:.0%} off: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
