"""A whole SDPO step, ours against TRL's own `SDPOTrainer`: time outside generation and memory.

    python experiments/benchmarks/sdpo_step.py [--pairs 3] [--untied] [--hidden 512] [--threads 2] [--json FILE]

Both trainers train one random Qwen3 model in float32 on the CPU, on the same batch: 4 prompts with 2 completions each,
of which one is a success, so that one row in eight has something to learn. Reverse KL over the student's 100 likeliest
tokens with the tail, an average of the student as teacher, the same wording of its prompt, AdamW. Generation is left
out: both trainers' generation returns the same random completions at once.

Each trainer runs in its own process, and the steps are taken in turn, A B A B; the first pair warms up. A step lasts
from on_step_begin to on_step_end: rewards, teacher's prompts, losses, backward pass, optimizer and the teacher's
average; logging is left out. Memory is the peak resident memory during a step (VmHWM, reset before it) above the
resident memory before the step, which holds weights, teacher and optimizer state, but no gradients. So gradients, as
large as the weights in full training, are in both sides' memory.

Exits with 1 where the losses of the two differ, or a target is missed. Ratios of medians are what counts: on a machine
that does other work as well the seconds mean little. Linux only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from resident import reset_peak, resident_mb

VOCABULARY, PROMPTS, GENERATIONS = 151_936, 4, 2
PROMPT_CHARACTERS, COMPLETION_TOKENS = 64, 128
ALPHA, TOP_K, EMA_RATE = 1.0, 100, 0.05
TIME_TARGET, MEMORY_TARGET = 0.5, 0.25
LOSS_TOLERANCE = 1e-3
SIDES = ("ours", "trl")


@dataclass
class Step:
    """What one training step took."""

    step_s: float
    cpu_s: float  # of all threads together
    peak_mb: float
    loss: float
    passes: list[tuple[int, int]] = field(
        default_factory=list
    )  # rows and tokens, padding included, of each forward pass


# ---- in the process of one trainer ----


def save_model(folder: Path, hidden: int, layers: int, tied: bool) -> None:
    """TRL reads its teacher from the student's folder, so there has to be one."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 128), head_dim=64,
        max_position_embeddings=2048, tie_word_embeddings=tied, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        initializer_range=0.1,  # predictions as peaked as a trained model's, so that the losses compared are not zero
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)


def load_tokenizer() -> Any:
    """The embedded model's: characters. The ids that it leaves unused cost as much as the others."""
    from importlib.resources import files

    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(files("selfdistill")) + "/models/embedded")


def completions(tokenizer: Any) -> list[list[int]]:
    """Random letters and EOS, one per row; the row with the signal, the second, is of the mean length."""
    import random

    draw, letters = random.Random(0), tokenizer("abcdefghijklmnopqrstuvwxyz", add_special_tokens=False)["input_ids"]
    lengths = [COMPLETION_TOKENS + change for change in (8, 0, -24, 16, -8, 24, -16, 0)]
    return [[*draw.choices(letters, k=length - 1), tokenizer.eos_token_id] for length in lengths]


def first_row_succeeds(completions: list, **_: Any) -> list[float]:
    """Then only its peer, the second row, has a teacher with something to show."""
    return [1.0] + [0.0] * (len(completions) - 1)


def settings(folder: Path, steps: int) -> dict[str, Any]:
    """What both trainers' arguments share."""
    return {
        "output_dir": str(folder / "run"), "max_steps": steps, "per_device_train_batch_size": PROMPTS * GENERATIONS,
        "gradient_accumulation_steps": 1, "num_generations": GENERATIONS,
        "max_completion_length": 2 * COMPLETION_TOKENS,
        "learning_rate": 1e-5, "lr_scheduler_type": "constant", "beta": 0.0, "temperature": 1.0, "use_cpu": True,
        "bf16": False, "gradient_checkpointing": False, "shuffle_dataset": False, "report_to": [], "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False, "remove_unused_columns": False,
        "seed": 0,
    }  # fmt: skip


def our_trainer(arguments: dict[str, Any], shared: dict[str, Any], answers: list[list[int]]) -> Any:
    from trl import GRPOTrainer

    from selfdistill import Distillation, SelfDistillConfig
    from selfdistill.teachers import Teacher
    from selfdistill.teachers.context import Feedback
    from selfdistill.teachers.weights import Ema
    from selfdistill.training.trainer import SelfDistillTrainer

    GRPOTrainer._generate_single_turn = lambda *_, **__: ([list(ids) for ids in answers], None)
    return SelfDistillTrainer(
        args=SelfDistillConfig(**arguments),
        teacher=Teacher(weights=Ema(rate=EMA_RATE), context=Feedback(use_feedback=False)),
        distillation=Distillation(alpha=ALPHA, top_k=TOP_K, tail=True),
        **shared,
    )


def trl_trainer(arguments: dict[str, Any], shared: dict[str, Any], answers: list[list[int]]) -> Any:
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    from selfdistill.teachers import templates

    SDPOTrainer._generate = lambda self, prompt_ids: (prompt_ids, [list(ids) for ids in answers])
    args = SDPOConfig(
        **arguments,
        distillation_mode="topk_logits",
        distillation_alpha=ALPHA,
        distillation_topk=TOP_K,
        distillation_add_tail=True,
        distillation_weight=1.0,
        teacher_model_kind="ema",
        teacher_update_rate=EMA_RATE,
        reprompt_template=templates.FEEDBACK,
        solution_template=templates.SOLUTION_BLOCK.replace("{solution}", "{successful_previous_attempt}"),
    )
    return SDPOTrainer(args=args, **shared)


def serve_steps(side: str, folder: Path, steps: int) -> None:
    """Trains, one step for each line on standard input; answers each with a `Step` as a line of JSON."""
    answer = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print is no answer

    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback

    tokenizer = load_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder)
    questions = [f"question {i} ".ljust(PROMPT_CHARACTERS, "x") for i in range(PROMPTS)]
    shared = {
        "model": model,
        "reward_funcs": [first_row_succeeds],
        "train_dataset": Dataset.from_list([{"prompt": [{"role": "user", "content": q}]} for q in questions]),
        "processing_class": tokenizer,
    }
    make = {"ours": our_trainer, "trl": trl_trainer}[side]
    trainer = make(settings(folder, steps), shared, completions(tokenizer))
    now = Step(0.0, 0.0, 0.0, 0.0)
    compute_loss = trainer.compute_loss

    def compute_and_note(*args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(*args, **kwargs)
        now.loss = loss.item()
        return loss

    def note_pass(module: Any, inputs: tuple, output: Any) -> None:
        rows, tokens, _ = output.last_hidden_state.shape
        now.passes.append((rows, rows * tokens))

    class Gate(TrainerCallback):
        """Waits for its turn before each step; added last, so that it sees the teacher's average taken as well."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not sys.stdin.readline():
                sys.exit("nobody asks for steps any more")
            now.passes = []
            reset_peak()
            self.before_mb = resident_mb("VmRSS")
            self.start_s, self.start_cpu_s = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now.step_s, now.cpu_s = time.perf_counter() - self.start_s, time.process_time() - self.start_cpu_s
            now.peak_mb = resident_mb("VmHWM") - self.before_mb
            print(json.dumps(asdict(now)), file=answer)

    trainer.compute_loss = compute_and_note
    modules = {id(m): m for m in (trainer.model, getattr(trainer, "teacher_model", trainer.model))}
    for module in modules.values():
        module.get_decoder().register_forward_hook(note_pass)
    trainer.add_callback(Gate())
    trainer.train()


# ---- in the process that asks for the steps ----


class Child:
    """The process of one trainer."""

    def __init__(self, side: str, folder: Path, arguments: argparse.Namespace) -> None:
        self.side, self.errors = side, (folder / f"{side}.txt").open("w+")
        command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--pairs", str(arguments.pairs)]
        root = Path(__file__).parents[2]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(arguments.threads),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
            "OMP_WAIT_POLICY": "passive",  # threads that wait turn no CPU time to waste where the cores are shared
            "HF_HUB_OFFLINE": "1",
            "TRL_EXPERIMENTAL_SILENCE": "1",
        }
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )

    def step(self) -> Step:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            return Step(**json.loads(self.process.stdout.readline()))
        except (BrokenPipeError, json.JSONDecodeError):
            self.process.wait()
            self.errors.seek(0)
            raise SystemExit(f"{self.side} ended:\n{self.errors.read()[-3000:]}") from None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()


def measure(arguments: argparse.Namespace) -> dict[str, list[Step]]:
    """The steps of each side, the warm-up first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder, arguments.hidden, arguments.layers, not arguments.untied)
        children = [Child(side, folder, arguments) for side in SIDES]
        try:
            steps: dict[str, list[Step]] = {side: [] for side in SIDES}
            for pair in range(arguments.pairs + 1):
                for child in children:
                    step = child.step()
                    steps[child.side].append(step)
                    name = f"pair {pair}" if pair else "warm-up"
                    taken = f"{step.step_s:.2f} s, CPU {step.cpu_s:.2f} s, {step.peak_mb:.0f} MB"
                    print(f"{name}, {child.side}: {taken}", file=sys.stderr, flush=True)
            return steps
        finally:
            for child in children:
                child.close()


def report(steps: dict[str, list[Step]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints the table; returns the figures."""
    from rich.console import Console
    from rich.table import Table

    median = {
        quantity: {side: statistics.median(getattr(s, quantity) for s in steps[side][1:]) for side in SIDES}
        for quantity in ("step_s", "cpu_s", "peak_mb")
    }
    ratio = {quantity: values["ours"] / values["trl"] for quantity, values in median.items()}
    pairs = list(zip(*(steps[side] for side in SIDES), strict=True))
    # Both start from the same weights; later steps see what each made of them, and its teacher's average.
    difference = max(abs(a.loss - b.loss) / abs(b.loss) for a, b in pairs)
    title = f"One SDPO step, hidden {arguments.hidden}, {arguments.layers} layers, {arguments.threads} threads"
    table = Table(title=title, caption=f"medians of {arguments.pairs} steps in turn")
    for name in ("", "ours", "TRL", "ours / TRL", "wanted"):
        table.add_column(name, justify="left" if not name else "right")

    def row(name: str, quantity: str, unit: str, target: float) -> None:
        shown = [f"{median[quantity][side]:{unit}}" for side in SIDES]
        verdict = "met" if ratio[quantity] <= target else "missed"
        table.add_row(name, *shown, f"{ratio[quantity]:.3f}", f"<= {target} {verdict}")

    row("step without generation, s", "step_s", ".2f", TIME_TARGET)
    row("the same in CPU time, s", "cpu_s", ".2f", TIME_TARGET)
    row("peak memory beyond weights, teacher and optimizer, MB", "peak_mb", ".0f", MEMORY_TARGET)
    passes = [" + ".join(f"{rows} x {tokens // rows}" for rows, tokens in steps[side][-1].passes) for side in SIDES]
    table.add_row("forward passes, rows x tokens", *passes, "", "")
    shown = [f"{steps[side][0].loss:.6f}" for side in SIDES]
    table.add_row("loss of the first step", *shown, f"{pairs[0][0].loss / pairs[0][1].loss:.6f}", "1")
    verdict = "met" if difference <= LOSS_TOLERANCE else "missed"
    table.add_row(
        "largest relative difference of a loss", f"{difference:.1e}", "", "", f"<= {LOSS_TOLERANCE} {verdict}"
    )
    Console(width=120).print(table)
    met = ratio["step_s"] <= TIME_TARGET and ratio["peak_mb"] <= MEMORY_TARGET and difference <= LOSS_TOLERANCE
    return {
        "hidden": arguments.hidden, "layers": arguments.layers, "tied": not arguments.untied,
        "threads": arguments.threads, "median": median, "ratio": ratio, "largest_loss_difference": difference,
        "targets_met": met, "steps": {side: [asdict(s) for s in steps[side]] for side in SIDES},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="pairs of steps after the warm-up")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size, a multiple of 128")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--untied", action="store_true", help="a head of its own instead of the embedding")
    parser.add_argument("--threads", type=int, default=2, help="of each trainer; they never work at the same time")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        serve_steps(arguments.side, arguments.folder, arguments.pairs + 1)
        return
    figures = report(measure(arguments), arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(0 if figures["targets_met"] else 1)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
