"""What student and teacher really saw, as a page to read."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from selfdistill.rollout import Prompt, Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(
    rollouts: Rollouts,
    teacher_prompts: Sequence[Prompt | None],
    tokenizer: "PreTrainedTokenizerBase",
    chat_template_kwargs: dict[str, Any] | None = None,
    *,
    rows: int = 4,
    student_ids: Sequence[Sequence[int]] | None = None,
    teacher_ids: Sequence[Sequence[int] | None] | None = None,
) -> str:
    """A Markdown page with the prompts of the first rollouts after the chat template, and what came back.

    Args:
        rollouts: the batch.
        teacher_prompts: what a context made of it; None where a rollout is not distilled.
        tokenizer: its chat template renders prompts that are messages.
        chat_template_kwargs: as in training.
        rows: how many rollouts to show; where none of them is distilled, the first one that is comes after them.
        student_ids: the sequences that the student really scored, prompt and completion without padding. With them
            the page says whether they begin with the prompt shown and end in the sampled ids; without them the
            sequences are put together here.
        teacher_ids: the same of the teacher; entries of rollouts that are not distilled are not read.
    """
    kwargs = chat_template_kwargs or {}
    shown = list(range(min(rows, len(rollouts))))
    active = [i for i, prompt in enumerate(teacher_prompts) if prompt is not None]
    if active and active[0] >= len(shown):
        shown.append(active[0])
    parts = ["# What student and teacher saw"]
    parts.append(
        f"{len(rollouts)} rollouts, {rollouts.num_generations} per prompt; {len(active)} of them are distilled. "
        "Prompts are shown as text after the chat template."
    )
    for i in shown:
        parts.append(f"## Rollout {i}")
        ids = list(rollouts.completion_ids[i])
        checks = []
        for who, prompt, sequences in (
            ("student", rollouts.prompts[i], student_ids),
            ("teacher", teacher_prompts[i], teacher_ids),
        ):
            if prompt is None:
                parts.append(f"**{who.capitalize()}**: no signal for this rollout; it is not distilled.")
                continue
            prompt_ids = _prompt_ids(prompt, tokenizer, kwargs)
            sequence = list((sequences[i] if sequences is not None else None) or prompt_ids + ids)
            parts.append(f"**{who.capitalize()}** ({len(sequence) - len(ids)} prompt tokens)")
            parts.append(_fenced(_prompt_text(prompt, tokenizer, kwargs)))
            checks.append(
                f"- {who}: begins with the ids of this prompt: {_yes(sequence[: -len(ids) or None] == prompt_ids)}"
            )
            checks.append(f"- {who}: ends in the completion's ids: {_yes(sequence[len(sequence) - len(ids) :] == ids)}")
        parts.append(f"**Completion** ({len(ids)} tokens)")
        parts.append(_fenced(rollouts.completions[i]))
        parts.append(_fenced(" ".join(map(str, ids))))
        score = rollouts.scores[i] if rollouts.scores else None
        parts.append(f"**Score**: {'none' if score is None else f'{score:g}'}")
        feedback = rollouts.feedback[i] if rollouts.feedback else None
        parts.append("**Feedback**: none" if feedback is None else f"**Feedback**\n\n{_fenced(feedback)}")
        parts.append("**Token ids**\n\n" + "\n".join(checks))
    return "\n\n".join(parts) + "\n"


def _prompt_text(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", kwargs: dict[str, Any]) -> str:
    if isinstance(prompt, str):
        return prompt
    return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **kwargs))


def _prompt_ids(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase", kwargs: dict[str, Any]) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False, **kwargs))


def _yes(holds: bool) -> str:
    return "yes" if holds else "**NO**"


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    fence = "`" * max([2, *(len(run) for run in re.findall("`+", text))]) + "`"
    return f"{fence}text\n{text}\n{fence}"
