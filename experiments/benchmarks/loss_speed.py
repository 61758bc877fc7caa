"""Time and memory of the distillation loss from hidden states, against TRL's SDPO loss on materialised logits.

    OMP_NUM_THREADS=2 python experiments/benchmarks/loss_speed.py [--repeats 5] [--only top_k] [--tokens 1024]

Forward and backward from the last hidden states of student and teacher to the gradient of the student's hidden states
(and head, where it is trained). TRL's side runs its own `SDPOTrainer._compute_self_distillation_loss`, imported, on
logits of all positions; ours projects the valid ones. Both losses and gradients are compared before anything is timed.

Columns: seconds are the least of the repeats, the three taken in turn in one process; `others` is the largest share of
the machine that other processes had during these three (Linux): a table with more than a few percent there means
little. `MB` is the peak of resident memory above what inputs take, each side in a process of its own. `products` are
the bare matrix products of our side over the valid tokens in one piece, into memory that is already there: 2
projections and the gradient of the hidden states, and of the head where it is trained; `own products` are those that
the loss really makes, chunk by chunk so as to hold few logits, as the profiler sees them. A trained head's gradient
(V × H floats) is in both sides' MB.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from resident import reset_peak, resident_mb
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from selfdistill.losses import aggregate, aggregation_weights, chunked_token_divergence

ROWS, HIDDEN, VOCABULARY, VALID = 4, 512, 151_936, 0.6
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
Options = dict[str, Any]
CASES: dict[str, Options] = {
    "top_k": {"alpha": 0.5, "top_k": 100},
    "top_k, head trained": {"alpha": 0.5, "top_k": 100, "trained": True},
    "top_k renormalised": {"alpha": 0.5, "top_k": 100, "tail": False},
    "full, alpha 0": {"alpha": 0.0},
    "full, alpha 0.5": {"alpha": 0.5},
    "full, alpha 1": {"alpha": 1.0},
    "full, alpha 0.5, head trained": {"alpha": 0.5, "trained": True},
}
MODE = "seq_mean_token_mean"


@dataclass
class Inputs:
    student_hidden: Tensor  # (B, T, H)
    teacher_hidden: Tensor
    student_head: Tensor  # (V, H)
    teacher_head: Tensor
    mask: Tensor  # (B, T)
    trained: bool

    @staticmethod
    def make(tokens: int, trained: bool) -> "Inputs":
        torch.manual_seed(0)
        shape = (ROWS, tokens // ROWS, HIDDEN)
        student, head = torch.randn(shape), torch.randn(VOCABULARY, HIDDEN).mul_(3 / HIDDEN**0.5)
        teacher, teacher_head = student + 0.3 * torch.randn(shape), head + 0.001
        lengths = (torch.linspace(0.4, 0.8, ROWS) * shape[1]).round()
        lengths[-1] = round(VALID * tokens) - lengths[:-1].sum()
        mask = (torch.arange(shape[1]) < lengths[:, None]).float()
        return Inputs(student.requires_grad_(), teacher, head.requires_grad_(trained), teacher_head, mask, trained)

    def first(self, tokens: int) -> "Inputs":
        """The first tokens of one row."""
        student = self.student_hidden.detach()[:1, :tokens].requires_grad_()
        return replace(
            self, student_hidden=student, teacher_hidden=self.teacher_hidden[:1, :tokens], mask=self.mask[:1, :tokens]
        )


def ours(x: Inputs, options: Options) -> Tensor:
    valid = x.mask.bool()
    weights = aggregation_weights(x.mask, MODE)[valid]
    values = chunked_token_divergence(
        x.student_hidden[valid], x.teacher_hidden[valid], x.student_head, x.teacher_head, weights=weights, **options
    )
    return aggregate(torch.zeros_like(x.mask).masked_scatter(valid, values), x.mask, MODE)


def trl(x: Inputs, options: Options) -> Tensor:
    from trl.experimental.sdpo.sdpo_trainer import DistillationLogits, SDPOTrainer

    with torch.no_grad():
        teacher_logits = x.teacher_hidden @ x.teacher_head.T
    logits = DistillationLogits(
        completion_ids=torch.zeros_like(x.mask, dtype=torch.long),
        completion_mask=x.mask,
        loss_mask=x.mask,
        student_logits=x.student_hidden @ x.student_head.T,
        teacher_logits=teacher_logits,
    )
    top_k = options.get("top_k")
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(
            distillation_mode="topk_logits" if top_k else "full_logits",
            distillation_topk=top_k,
            distillation_alpha=options["alpha"],
            distillation_add_tail=options.get("tail", True),
            distillation_is_clip=None,
        ),
        accelerator=SimpleNamespace(gather=lambda value: value),
        _log_self_distillation_metric=lambda mode, value: None,
    )
    model: Any = SimpleNamespace(training=True)
    loss: Tensor = SDPOTrainer._compute_self_distillation_loss(trainer, model, {}, logits)
    return loss


def products(x: Inputs) -> Callable[[], None]:
    """The products, ready to run, with their results' memory already touched."""
    valid = x.mask.bool()
    student, teacher = x.student_hidden.detach()[valid], x.teacher_hidden[valid]
    head = x.student_head.detach()
    logits = torch.zeros(len(student), VOCABULARY)
    grad_hidden, grad_head = torch.zeros_like(student), torch.zeros_like(head) if x.trained else None

    def run() -> None:
        torch.mm(student, head.T, out=logits)
        torch.mm(teacher, x.teacher_head.T, out=logits)
        torch.mm(logits, head, out=grad_hidden)
        if grad_head is not None:
            torch.mm(logits.T, student, out=grad_head)

    return run


def gradient_of(side: Callable[[Inputs, Options], Tensor], x: Inputs, options: Options) -> tuple[Tensor, list[Tensor]]:
    loss = side(x, options)
    return loss.detach(), list(torch.autograd.grad(loss, [x.student_hidden, x.student_head][: 1 + x.trained]))


def over_own_products(x: Inputs, options: Options) -> float:
    """Our time over that of the matrix products in it, median of three profiled runs."""
    ratios = []
    for _ in range(3):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            elapsed_s = timing(lambda: gradient_of(ours, x, options)).seconds
        own_us = sum(e.self_cpu_time_total for e in profiler.key_averages() if e.key in PRODUCTS)
        ratios.append(elapsed_s / (own_us / 1e6))
    return statistics.median(ratios)


@dataclass
class Timing:
    seconds: float
    others: float  # share of the machine's CPUs


def cpu_seconds() -> tuple[float, float]:
    """Of all processors and of this process, since boot or start."""
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    busy = sum(fields) - fields[3] - fields[4]
    return busy / os.sysconf("SC_CLK_TCK"), time.process_time()


def timing(action: Callable[[], object]) -> Timing:
    busy, own = cpu_seconds()
    start = time.perf_counter()
    action()
    elapsed = time.perf_counter() - start
    busy_after, own_after = cpu_seconds()
    others = (busy_after - busy - (own_after - own)) / (elapsed * (os.cpu_count() or 1))
    return Timing(elapsed, max(0.0, others))


def peak_mb(case: str, side: str, tokens: int) -> float:
    options = dict(CASES[case])
    trained = options.pop("trained", False)
    function = {"ours": ours, "trl": trl}[side]
    x = Inputs.make(tokens, trained)
    # Imports, thread pools and work areas of the matrix library are no part of either side.
    gradient_of(function, x.first(2), options)
    reset_peak()
    before = resident_mb("VmRSS")
    gradient_of(function, x, options)
    return resident_mb("VmHWM") - before


def measure(case: str, tokens: int, repeats: int) -> tuple[dict[str, Timing], float]:
    """The three timings, and `over_own_products`."""
    options = dict(CASES[case])
    x = Inputs.make(tokens, options.pop("trained", False))
    mine, theirs = gradient_of(ours, x, options), gradient_of(trl, x, options)
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-4, atol=1e-6)
    for a, b in zip(mine[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())
    del mine, theirs
    bare = products(x)
    bare()
    actions: dict[str, Callable[[], object]] = {
        "ours": lambda: gradient_of(ours, x, options),
        "products": bare,
        "trl": lambda: gradient_of(trl, x, options),
    }
    runs = [{name: timing(action) for name, action in actions.items()} for _ in range(repeats)]
    least = {name: min((run[name] for run in runs), key=lambda t: t.seconds) for name in actions}
    return least, over_own_products(x, options)


def in_a_process(*arguments: object) -> float:
    command = [sys.executable, __file__, *map(str, arguments)]
    return float(
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024, help="positions, of which 60%% are valid")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        case, side = arguments.peak
        print(json.dumps(peak_mb(case, side, arguments.tokens)))
        return
    valid = int(Inputs.make(arguments.tokens, False).mask.sum())
    print(f"{torch.get_num_threads()} threads, {valid} valid of {arguments.tokens} tokens, H {HIDDEN}, V {VOCABULARY}")
    heads = [
        "ours s",
        "TRL s",
        "products s",
        "ours MB",
        "TRL MB",
        "time / TRL",
        "TRL MB / ours",
        "time / products",
        "time / own products",
    ]
    print(f"| {'case':30} | " + " | ".join([*heads, "others"]) + " |\n|" + "---|" * (2 + len(heads)))
    for case in CASES:
        if arguments.only not in case:
            continue
        row, own_ratio = measure(case, arguments.tokens, arguments.repeats)
        mine = theirs = float("nan")
        if not arguments.no_memory:
            mine, theirs = (
                in_a_process("--tokens", arguments.tokens, "--peak", case, side) for side in ("ours", "trl")
            )
        ours_s, trl_s, products_s = (row[name].seconds for name in ("ours", "trl", "products"))
        cells = [f"{x:.2f}" for x in (ours_s, trl_s, products_s)] + [f"{x:.0f}" for x in (mine, theirs)]
        cells += [f"{ours_s / trl_s:.2f}", f"{theirs / mine:.1f}", f"{ours_s / products_s:.2f}"]
        cells.append(f"{own_ratio:.2f}")
        cells.append(f"{max(t.others for t in row.values()):.0%}")
        print(f"| {case:30} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
