"""What is looked at in the rollouts of a step: metrics, sampled completions, the prompts of student and teacher."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from selfdistill.rollout import Rollouts
from selfdistill.runs.folder import PromptSample
from selfdistill.statistics import completion_metrics, reward_spread

PROMPT_SAMPLES = 4


def rollout_metrics(rollouts: Rollouts, *, rewarded: bool) -> dict[str, float]:
    """How repetitive and how varied the completions are, and how far the rewards of one prompt differ."""
    metrics: dict[str, float | None] = dict(completion_metrics(rollouts.completion_ids))
    if rewarded:
        metrics["monitor/reward_spread"] = reward_spread(rollouts.scores, rollouts.num_generations)
    return {name: value for name, value in metrics.items() if value is not None}


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
    taught = [i for i, sent in enumerate(rollouts.sent_to_teacher) if sent is not None]
    if taught and not set(taught) & set(chosen):
        chosen.append(taught[0])
    samples = []
    for i in chosen:
        sent = rollouts.sent_to_teacher[i] if i in taught else None
        samples.append(
            PromptSample(
                student=str(tokenizer.decode(rollouts.prompt_ids[i])),
                completion=str(tokenizer.decode(rollouts.completion_ids[i])),
                completion_ids=list(rollouts.completion_ids[i]),
                teacher=str(tokenizer.decode(sent[0])) if sent else None,
                teacher_completion_ids=sent[1] if sent else None,
            )
        )
    return samples
