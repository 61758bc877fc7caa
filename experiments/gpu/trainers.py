"""The trainers of a case: ours as the program builds it, and TRL's with the same model, data, batch and settings."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from experiments.gpu.cases import OPD, Case
from experiments.gpu.workload import FEEDBACK, first_succeeds
from selfdistill.config import Run
from selfdistill.config.targets import make
from selfdistill.models.loading import load_configured, lora_config
from selfdistill.rewards.scorer import PolicyScorer
from selfdistill.teachers import templates
from selfdistill.training.arguments import trainer_arguments, use_cuda
from selfdistill.training.build import build, load_data
from selfdistill.training.engine import starting_vllm

# What ours and TRL's other trainers call by the same name and mean the same by. `beta` is not among them: it is the
# weight of a KL penalty in GRPO, and the divergence's interpolation in Distillation.
SHARED = frozenset(
    """output_dir seed max_steps learning_rate lr_scheduler_type weight_decay max_grad_norm per_device_train_batch_size
    gradient_accumulation_steps gradient_checkpointing use_cpu bf16 fp16 temperature top_p top_k min_p num_generations
    max_completion_length save_strategy report_to disable_tqdm dataloader_pin_memory scale_rewards
    use_vllm vllm_mode vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_tensor_parallel_size
    vllm_max_model_length""".split()
)


def our_trainer(run: Run, folder: Path, at_end: ExitStack) -> Any:
    """What `python -m selfdistill.train` would train."""
    return build(run, folder, at_end).trainer


def trl_trainer(case: Case, run: Run, folder: Path) -> Any:
    """TRL's trainer for the same work."""
    model, tokenizer = load_configured(asdict(run.model))
    rows = load_data(run, tokenizer).train
    adapter = lora_config(**asdict(run.model.lora)) if run.model.tuning == "lora" else None
    shared = {"model": model, "processing_class": tokenizer, "peft_config": adapter}
    with starting_vllm(run.hardware.vllm, cuda=use_cuda(run.hardware)):
        return PEERS[case.work](run, folder, rows, shared)


def _arguments(kind: type, run: Run, folder: Path, **own: Any) -> Any:
    """A trainer's arguments: those of our run where they are shared, and its own."""
    ours = trainer_arguments(run, folder)
    known = {field.name for field in fields(kind)} & SHARED
    return kind(**{name: getattr(ours, name) for name in known} | {"logging_steps": 1} | own)


def _sft(run: Run, folder: Path, rows: Dataset, shared: dict[str, Any]) -> Any:
    def answered(row: dict[str, Any]) -> dict[str, Any]:
        return {"completion": [{"role": "assistant", "content": row["golden_response"][0]}]}

    kept = rows.map(answered).select_columns(["prompt", "completion"])
    args = _arguments(trl.SFTConfig, run, folder, max_length=None)
    return trl.SFTTrainer(args=args, train_dataset=kept, **shared)


def _grpo(run: Run, folder: Path, rows: Dataset, shared: dict[str, Any]) -> Any:
    reward = make(run.reward, "reward")

    def supervised(**columns: Any) -> list[float | None]:
        return reward(**columns)

    args = _arguments(trl.GRPOConfig, run, folder, beta=run.beta, remove_unused_columns=False)
    trainer = trl.GRPOTrainer(args=args, reward_funcs=[supervised], train_dataset=rows, **shared)
    tokenizer: PreTrainedTokenizerBase = shared["processing_class"]
    reward.bind(PolicyScorer(trainer.accelerator.unwrap_model(trainer.model), tokenizer))
    return trainer


def _sdft(run: Run, folder: Path, rows: Dataset, shared: dict[str, Any]) -> Any:
    args = _arguments(
        SDFTConfig,
        run,
        folder,
        distillation_mode="full_logits",
        distillation_topk=None,
        distillation_alpha=run.distillation.alpha,
        teacher_model_kind="base",
        teacher_prompt_template=templates.DEMONSTRATION.replace("{demonstration}", "{privileged_context}"),
        max_prompt_length=None,
    )
    shown = rows.map(lambda row: {"privileged_context": row["golden_response"][0]})
    return SDFTTrainer(args=args, train_dataset=shown, **shared)


def _sdpo(run: Run, folder: Path, rows: Dataset, shared: dict[str, Any]) -> Any:
    assert run.teacher is not None
    context, weights, distillation = run.teacher["context"], run.teacher["weights"], run.distillation
    with_feedback = bool(context["use_feedback"])
    args = _arguments(
        SDPOConfig,
        run,
        folder,
        distillation_mode="topk_logits",
        distillation_topk=distillation.top_k,
        distillation_alpha=distillation.alpha,
        distillation_add_tail=distillation.tail,
        distillation_weight=distillation.weight / (distillation.weight + run.policy_weight),
        teacher_model_kind="ema",
        teacher_update_rate=weights["rate"],
        include_environment_feedback=with_feedback,
        environment_feedback_only_without_solution=True,
        reprompt_template=templates.FEEDBACK,
        solution_template=templates.SOLUTION_BLOCK.replace("{solution}", "{successful_previous_attempt}"),
        feedback_template=templates.FEEDBACK_BLOCK.replace("{feedback}", "{feedback_raw}"),
        max_prompt_length=None,
        diagnostics_warning_interval=0,
    )
    if with_feedback:
        rows = rows.add_column("privileged_context", [FEEDBACK] * len(rows))
    return SDPOTrainer(args=args, reward_funcs=[first_succeeds], train_dataset=rows, **shared)


def _distillation(run: Run, folder: Path, rows: Dataset, shared: dict[str, Any], beta: float) -> Any:
    """Its loss over the whole vocabulary is TRL's chunked kernel, in Triton on a GPU."""
    assert run.teacher is not None
    teacher = AutoModelForCausalLM.from_pretrained(run.teacher["weights"]["name"], dtype="auto")
    args = _arguments(trl.DistillationConfig, run, folder, beta=beta)
    return trl.DistillationTrainer(args=args, teacher_model=teacher, train_dataset=rows, **shared)


PEERS: dict[str, Callable[[Run, Path, Dataset, dict[str, Any]], Any]] = {
    "sft": _sft,
    "grpo_supervised": _grpo,
    "sdft": _sdft,
    "sdpo": _sdpo,
    "sdpo_feedback": _sdpo,
    "hybrid": _sdpo,
    "gkd": partial(_distillation, beta=0.5),
    OPD: partial(_distillation, beta=1.0),  # it has no sampled-token loss: the whole reverse KL
}
