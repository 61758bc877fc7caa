"""What is looked at in the rollouts of a step: metrics, sampled completions, the prompts of student and teacher."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selfdistill.evaluation.monitors import completion_metrics, reward_spread
from selfdistill.rollout import Prompt, Rollouts
from selfdistill.runs.folder import PromptSample

PROMPT_SAMPLES = 4


def rollout_metrics(rollouts: Rollouts, *, rewarded: bool) -> dict[str, float]:
    """How repetitive and how varied the completions are, and how far the rewards of one prompt differ."""
    metrics: dict[str, float | None] = dict(completion_metrics(rollouts.completion_ids))
    if rewarded:
        metrics["monitor/reward_spread"] = reward_spread(rollouts.scores, rollouts.num_generations)
    return {name: value for name, value in metrics.items() if value is not None}


def completion_rows(rollouts: Rollouts, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """For each rollout prompt, completion, reward, feedback and advantage, a mean where each token has its own."""
    advantages = tensors["advantages"]
    if advantages.dim() > 1:
        mask = tensors["completion_mask"]
        advantages = (advantages * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    names = ("prompt", "completion", "reward", "feedback", "advantage")
    columns = rollouts.prompts, rollouts.completions, rollouts.scores, rollouts.feedback, advantages.tolist()
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def prompt_samples(
    tokenizer: PreTrainedTokenizerBase,
    rollouts: Rollouts,
    teacher_prompts: list[Prompt | None] | None,
    tensors: dict[str, Tensor],
) -> list[PromptSample]:
    """The first rollout of the first prompts as student and teacher see it, from the ids that go into the models.

    Where the teacher has no signal for any of these, the first rollout for which it has one is added.
    """
    chosen = list(range(0, len(rollouts), max(1, rollouts.num_generations))[:PROMPT_SAMPLES])
    taught = [i for i, prompt in enumerate(teacher_prompts or []) if prompt is not None]
    if taught and not set(taught) & set(chosen):
        chosen.append(taught[0])
    samples = []
    for i in chosen:
        student = tensors["prompt_ids"][i][tensors["prompt_mask"][i].bool()].tolist()
        scored = tensors["completion_ids"][i][tensors["completion_mask"][i].bool()].tolist()
        teacher, teacher_completion_ids = None, None
        if i in taught:
            mask = tensors["teacher_prompt_mask"][i].bool()
            teacher = str(tokenizer.decode(tensors["teacher_prompt_ids"][i][mask]))
            # A completion that is masked as a whole is not scored.
            teacher_completion_ids = scored or None
        samples.append(
            PromptSample(
                student=str(tokenizer.decode(student)),
                completion=str(tokenizer.decode(rollouts.completion_ids[i])),
                completion_ids=list(rollouts.completion_ids[i]),
                teacher=teacher,
                teacher_completion_ids=teacher_completion_ids,
            )
        )
    return samples
