"""One case, measured in this process.

    python -m experiments.gpu.measure CASE --out FILE [--tiny] [--profile gpu_80gb] [--work FOLDER] [--started SECONDS]
    python -m experiments.gpu.measure CASE --prepare          makes its models, and measures nothing

`python experiments/gpu/run.py` starts this for each case, with a time limit.
"""

import argparse
import json
import os
import time
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from experiments.gpu.cases import CASES, LOSSES, Case
from experiments.gpu.device import Device, UsedMemory, this_device
from experiments.gpu.meter import Meter
from experiments.gpu.models import model_folder, shape_of
from experiments.gpu.trainers import our_trainer, trl_trainer
from experiments.gpu.workload import composed, overrides, work_of
from selfdistill.losses import chunked_token_divergence
from selfdistill.training.engine import COLOCATED

# As far apart as a student and a teacher that knows a little more: 3 spreads the logits as a trained head does.
LOGIT_SPREAD, TEACHER_NOISE = 3.0, 0.3
LENGTH = "completions/mean_length"  # every one of these trainers that samples logs it


def measure(case: Case, device: Device, work: Path, started: float) -> dict[str, Any]:
    """The record of a case.

    Args:
        work: the folder with the models.
        started: when its process was started, in seconds since the epoch.
    """
    with UsedMemory(device) as memory:
        meter = Meter(device, memory)
        more = _loss(case, device, meter) if case.work in LOSSES else _training(case, device, work, meter)
    amount = work_of(case, device)
    return {
        "case": case.name,
        "date": date.today().isoformat(),
        **device.described(),
        "completions_per_step": amount.completions_per_step,
        "completion_tokens": amount.completion_tokens,
        "steps": meter.as_json(),
        "first_step_s": round(meter.ended_at[0] - started, 3),
        "end_to_end_s": round(meter.ended_at[-1] - started, 3),
        **more,
    }


def _training(case: Case, device: Device, work: Path, meter: Meter) -> dict[str, Any]:
    if case.sampler == "vllm":
        for name, value in COLOCATED.items():
            os.environ.setdefault(name, value)
    disable_progress_bar()
    run = composed(overrides(case, device, work))
    with TemporaryDirectory() as folder, ExitStack() as at_end:
        if case.side == "ours":
            trainer = our_trainer(run, Path(folder), at_end)
        else:
            trainer = trl_trainer(case, run, Path(folder))
        trainer.add_callback(meter.watch(trainer))
        trainer.train()
        log = trainer.state.log_history
        lengths = [line[LENGTH] for line in log if LENGTH in line]
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return {
        "parameters": parameters,
        "mean_completion_tokens": fmean(lengths) if lengths else None,
        "losses": [line["loss"] for line in log if "loss" in line],
    }


def _loss(case: Case, device: Device, meter: Meter) -> dict[str, Any]:
    """The divergence over the whole vocabulary and the gradient of the student's hidden states, with a frozen head."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    sizes, tokens, alpha = shape_of(case.shape, device), device.work.loss_tokens, LOSSES[case.work]
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": device.torch_device, "dtype": device.dtype}
    student = torch.randn(tokens, sizes["hidden_size"], **options).requires_grad_()
    teacher = student.detach() + TEACHER_NOISE * torch.randn_like(student)
    head = torch.randn(sizes["vocab_size"], sizes["hidden_size"], **options)
    head.mul_(LOGIT_SPREAD / sizes["hidden_size"] ** 0.5)

    def ours() -> Tensor:
        return chunked_token_divergence(student, teacher, head, head, alpha=alpha)

    def trls() -> Tensor:
        no_bias_scale_or_cap = (1.0, None, 1.0, None)
        return ChunkedDivergenceFunction.apply(
            student, head, None, teacher, head, None, alpha, 1.0, *no_bias_scale_or_cap
        )[0]

    divergence = {"ours": ours, "trl": trls}[case.side]
    losses = []
    for _ in range(device.work.steps):
        meter.begin()
        loss = divergence().mean()
        loss.backward()
        meter.end()
        student.grad = None
        losses.append(loss.item())
    return {"tokens": tokens, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--out", type=Path, help="the record, as JSON")
    parser.add_argument("--tiny", action="store_true", help="in a tiny size on the CPU")
    parser.add_argument("--profile", default="gpu_80gb", help="of conf/hardware")
    parser.add_argument("--work", type=Path, default=Path("outputs/gpu"), help="keeps the models between cases")
    parser.add_argument("--started", type=float, help="when the process was started, in seconds since the epoch")
    parser.add_argument("--prepare", action="store_true", help="only make the models")
    arguments = parser.parse_args()
    started = arguments.started or time.time()
    case, device = CASES[arguments.case], this_device(arguments.tiny, arguments.profile)
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.prepare:
        for seed in range(len(case.folders(arguments.tiny))):
            model_folder(case.shape, device, arguments.work, seed)
        return
    record = measure(case, device, arguments.work, started)
    arguments.out.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
