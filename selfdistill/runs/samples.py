"""What is looked at in the rollouts of a step: metrics, sampled completions, the prompts of student and teacher."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from selfdistill.rollout import Rollouts
from selfdistill.runs.folder import PromptSample
from selfdistill.runs.side_by_side import stretches
from selfdistill.statistics import completion_metrics, reward_spread

PROMPT_SAMPLES = 4


def rollout_metrics(rollouts: Rollouts, *, rewarded: bool) -> dict[str, float]:
    """How repetitive and how varied the completions are, and how far the rewards of one prompt differ."""
    metrics = completion_metrics(rollouts.completion_ids)
    spread = reward_spread(rollouts.scores, rollouts.num_generations)
    if spread is not None:
        metrics["monitor/reward_spread"] = spread
    if rewarded:
        metrics["monitor/unscored"] = sum(score is None for score in rollouts.scores) / max(len(rollouts), 1)
    return metrics


def completion_rows(rollouts: Rollouts) -> list[dict[str, Any]]:
    """For each rollout prompt, completion, reward, feedback and advantage."""
    names = ("prompt", "completion", "reward", "feedback", "advantage")
    columns = rollouts.prompts, rollouts.completions, rollouts.scores, rollouts.feedback, rollouts.advantages
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def prompt_samples(tokenizer: PreTrainedTokenizerBase, rollouts: Rollouts) -> list[PromptSample]:
    """The first rollout of the first prompts as student and teacher see it, from the ids that go into the models.

    Where the teacher has no signal for any of these, the first rollout for which it has one is added.
    """
    chosen = list(range(0, len(rollouts), max(1, rollouts.num_generations))[:PROMPT_SAMPLES])
    taught = {i: sent for i, sent in enumerate(rollouts.sent_to_teacher) if sent is not None}
    if taught and not taught.keys() & chosen:
        chosen.append(min(taught))
    samples = []
    for i in chosen:
        teacher_prompt, scored = taught.get(i, (None, None))
        samples.append(
            PromptSample(
                student=str(tokenizer.decode(rollouts.prompt_ids[i])),
                completion=str(tokenizer.decode(rollouts.completion_ids[i])),
                completion_ids=rollouts.completion_ids[i],
                teacher=None if teacher_prompt is None else str(tokenizer.decode(teacher_prompt)),
                teacher_completion_ids=scored,
                beside=() if teacher_prompt is None else stretches(tokenizer, rollouts.prompt_ids[i], teacher_prompt),
            )
        )
    return samples
