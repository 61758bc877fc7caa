"""What the teacher sees: the student's question together with something the student was not shown.

A context turns rollouts into teacher prompts, one per rollout and of the same kind as the student's, a string or
messages. The last user turn is replaced by the filled template; system turns and earlier turns stay as they are.
None means that there is nothing to learn from for this rollout: it is not distilled.
"""

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfdistill.config.suggestions import guess
from selfdistill.errors import UserError
from selfdistill.rollout import Prompt, Rollouts, shown_in
from selfdistill.teachers import templates
from selfdistill.teachers.templating import Template, cut, fill_last_user_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PEERS = ("first", "random", "shortest", "best")
FEEDBACK_WHEN = ("failed", "always")

# Scores are sums of float32 rewards: 0.7 comes back as 0.69999999 and is still a success at threshold 0.7.
SCORE_TOLERANCE = 1e-6


class Context:
    """What the teacher sees: a class with `prompts`, and with `check` where it reads columns of the data.

    Attributes:
        needs_reward: whether it shows what a reward says, so that there must be one.
    """

    needs_reward = False

    def check(self, columns: Mapping[str, Iterable[Any]]) -> None:
        """Called before training with the data's columns beside `prompt`.

        Raises:
            UserError: a column is missing or empty.
        """

    def prompts(self, rollouts: Rollouts, tokenizer: "PreTrainedTokenizerBase") -> list[Prompt | None]:
        """What the teacher is shown for each rollout; None where there is nothing to learn from."""
        raise NotImplementedError


class NoContext(Context):
    """The teacher sees what the student saw: distillation between models, or from an older self (GKD)."""

    def prompts(self, rollouts: Rollouts, tokenizer: "PreTrainedTokenizerBase") -> list[Prompt | None]:
        """The student's own prompts."""
        return list(rollouts.prompts)


class _Column(Context):
    """A context that comes from a column of the data: one text, or a list of texts that are joined."""

    def __init__(
        self, slot: str, default: str, field: str, template: str | None, max_tokens: int | None, separator: str
    ) -> None:
        _check_token_budget("max_tokens", max_tokens)
        self.slot = slot
        self.field = field
        self.template = _template("template", template, default, {"prompt": True, slot: True})
        self.max_tokens = max_tokens
        self.separator = separator

    def check(self, columns: Mapping[str, Iterable[Any]]) -> None:
        """To call before training: `columns` are the data's columns beside `prompt`; of them only `field` is read.

        Raises:
            UserError: the data has no column `field`, or every row of it is empty.
        """
        self._check_name(columns)
        if not any(self._text(value) for value in shown_in(columns, self.field)):
            filled = sorted(name for name, values in columns.items() if name != "id" and any(map(self._text, values)))
            raise UserError(
                f"teacher.context.field={self.field}: this column is empty in every row, so that nothing could be "
                f"learned. Name one that holds texts: {', '.join(filled) or 'no column does'}."
            )

    def _check_name(self, columns: Mapping[str, Iterable[Any]]) -> None:
        if self.field in columns:
            return
        raise UserError(
            f"teacher.context.field={self.field}: the data has no such column; beside prompt it has "
            f"{', '.join(sorted(columns)) or 'none'}{guess(self.field, columns)} "
            f"Name the column that holds what the teacher is shown as {{{self.slot}}}."
        )

    def prompts(self, rollouts: Rollouts, tokenizer: "PreTrainedTokenizerBase") -> list[Prompt | None]:
        """The prompts with the column's text filled in; None where a row has none.

        Raises:
            UserError: the data has no column `field`, or a prompt has no user turn.
        """
        self._check_name(rollouts.columns)
        prompts: list[Prompt | None] = []
        for prompt, value in zip(rollouts.prompts, shown_in(rollouts.columns, self.field), strict=True):
            shown = cut(self._text(value), self.max_tokens, tokenizer)
            prompts.append(fill_last_user_turn(prompt, self.template, **{self.slot: shown}) if shown else None)
        return prompts

    def _text(self, value: Any) -> str:
        items = value if isinstance(value, list | tuple) else [value]
        texts = [str(item) for item in items if item is not None]
        return self.separator.join(text for text in texts if text.strip())


class Demonstration(_Column):
    """The question with golden responses as examples of a good response (SDFT, arXiv 2601.19897).

    Args:
        field: the data's column with the golden responses: a list of texts, or one text. A row without one shows its
            `answer`, and gives no signal where it has none.
        template: a text with {prompt} and {demonstration}, or a file (see `Template`); None for the default.
        max_tokens: longer demonstrations are cut at their end; None for no limit.
        separator: stands between several golden responses.
    """

    def __init__(
        self,
        field: str = "golden_response",
        template: str | None = None,
        max_tokens: int | None = 1024,
        separator: str = "\n",
    ) -> None:
        super().__init__("demonstration", templates.DEMONSTRATION, field, template, max_tokens, separator)


class Answer(_Column):
    """The question with its reference solution (OPSD, arXiv 2601.18734).

    Args:
        field: the data's column with the reference solution; an empty one gives no signal.
        template: a text with {prompt} and {answer}, or a file (see `Template`); None for the default.
        max_tokens: a longer solution is cut at its end; None for no limit.
    """

    def __init__(self, field: str = "answer", template: str | None = None, max_tokens: int | None = 1024) -> None:
        super().__init__("answer", templates.ANSWER, field, template, max_tokens, "\n")


@dataclass(frozen=True)
class Source:
    """What one rollout is distilled from.

    Attributes:
        peer: the rollout whose completion is shown as a correct solution, by its index in the batch, or None.
        solution: that completion's text without its thinking, not yet cut to the budget, or None.
        feedback: what the reward said about this very rollout, where it is shown, or None.
    """

    peer: int | None
    solution: str | None
    feedback: str | None


@dataclass(eq=False)
class Feedback(Context):
    """The question with a successful peer's solution, with the rollout's own feedback, or with both (SDPO, 2601.20802).

    Rollout i of a group with scores s is shown, where `use_solution`, the completion of one peer j with
    s_j >= success_threshold, and where `use_feedback` what the reward said about rollout i. A rollout with neither is
    not distilled. docs/DEVIATIONS.md lists where the paper, its code, TRL and these rules differ.

    Args:
        template: a text with {prompt}, {solution} and {feedback}, or a file (see `Template`); None for the default.
            A slot that is switched off may be left out.
        solution_block: what stands for {solution} in the template where there is one: a text with {solution}.
        feedback_block: what stands for {feedback} in the template where there is one: a text with {feedback}.
        success_threshold: the score from which a rollout counts as a success. 1.0 as in TRL, since the default wording
            calls the peer's solution correct; the released SDPO configuration has 0.5, the same for scores of 0 and 1.
        exclude_own_success: a rollout is never shown its own success, so that the only success of a group is not
            distilled (released code, TRL); False as in the paper's Table 2.
        peer: which success is shown: the "first" in the batch, a "random" one, the "shortest" in sampled tokens, or
            the "best" by score; of equals the first.
        use_solution: show a peer's success.
        use_feedback: show the reward's feedback.
        feedback_when: "failed" for rollouts that are not successes only (one that cannot be scored is none),
            or "always".
        feedback_with_solution: show feedback beside a solution too, not only where there is none.
        thinking_tag: the tag that opens the thinking in a completion; None where there is none.
        remove_thinking: show the peer's solution without its thinking; a peer of which nothing is left is not shown.
        max_solution_tokens: a longer solution is cut at its end; None for no limit.
        max_feedback_tokens: longer feedback is cut at its end; None for no limit.
        seed: of `peer="random"`. The draw depends on it and on the rollouts' content alone, not on what was drawn
            before, so that a resumed run draws as the unbroken one.

    Raises:
        UserError: an option is out of its range or a template is not as described.
    """

    needs_reward = True

    template: str | None = None
    solution_block: str | None = None
    feedback_block: str | None = None
    success_threshold: float = 1.0
    exclude_own_success: bool = True
    peer: str = "first"
    use_solution: bool = True
    use_feedback: bool = True
    feedback_when: str = "failed"
    feedback_with_solution: bool = False
    thinking_tag: str | None = "<think>"
    remove_thinking: bool = True
    max_solution_tokens: int | None = 2048
    max_feedback_tokens: int | None = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.use_solution or self.use_feedback):
            raise UserError(
                "teacher.context: use_solution and use_feedback are both false, so the teacher would see nothing. "
                "Set one to true, or write teacher/context=none."
            )
        _check_choice("peer", self.peer, PEERS)
        _check_choice("feedback_when", self.feedback_when, FEEDBACK_WHEN)
        _check_token_budget("max_solution_tokens", self.max_solution_tokens)
        _check_token_budget("max_feedback_tokens", self.max_feedback_tokens)
        tag = self.thinking_tag if self.remove_thinking else None
        if tag is not None and (len(tag) < 3 or tag[0].isalnum() or tag[1] == "/"):
            raise UserError(
                f"teacher.context.thinking_tag={tag}: write the opening tag with its brackets, e.g. <think>, or null."
            )
        self._thinking_tag = tag
        slots = {"prompt": True, "solution": self.use_solution, "feedback": self.use_feedback}
        self._template = _template("template", self.template, templates.FEEDBACK, slots)
        self._solution = _template("solution_block", self.solution_block, templates.SOLUTION_BLOCK, {"solution": True})
        self._feedback = _template("feedback_block", self.feedback_block, templates.FEEDBACK_BLOCK, {"feedback": True})

    def sources(self, rollouts: Rollouts) -> list[Source]:
        """What each rollout is distilled from. The batch must hold whole groups.

        Raises:
            ValueError: the number of rollouts is not a multiple of `num_generations`.
        """
        if len(rollouts) % rollouts.num_generations:
            raise ValueError(
                f"{len(rollouts)} rollouts are no whole groups of {rollouts.num_generations}: gather the groups first"
            )
        threshold = self.success_threshold - SCORE_TOLERANCE
        scores = rollouts.scores or [None] * len(rollouts)
        success = [score is not None and score >= threshold for score in scores]
        texts = [without_thinking(text, self._thinking_tag) for text in rollouts.completions]
        sources = []
        for i in range(len(rollouts)):
            candidates = [
                j
                for j in rollouts.group(i)
                if self.use_solution and success[j] and texts[j].strip() and not (self.exclude_own_success and j == i)
            ]
            peer = self._choose(i, candidates, rollouts)
            beside = peer is None or self.feedback_with_solution
            feedback = self._own_feedback(i, rollouts, success[i]) if beside else None
            sources.append(Source(peer, None if peer is None else texts[peer], feedback))
        return sources

    def prompts(self, rollouts: Rollouts, tokenizer: "PreTrainedTokenizerBase") -> list[Prompt | None]:
        """The prompts with solution and feedback filled in; None where a rollout has neither.

        Raises:
            UserError: a prompt has no user turn.
            ValueError: the batch does not hold whole groups.
        """
        prompts: list[Prompt | None] = []
        for prompt, source in zip(rollouts.prompts, self.sources(rollouts), strict=True):
            if source.solution is None and source.feedback is None:
                prompts.append(None)
                continue
            solution = feedback = ""
            if source.solution is not None:
                solution = self._solution.fill(solution=cut(source.solution, self.max_solution_tokens, tokenizer))
            if source.feedback is not None:
                feedback = self._feedback.fill(feedback=cut(source.feedback, self.max_feedback_tokens, tokenizer))
            prompts.append(fill_last_user_turn(prompt, self._template, solution=solution, feedback=feedback))
        return prompts

    def _own_feedback(self, i: int, rollouts: Rollouts, success: bool) -> str | None:
        if not (self.use_feedback and rollouts.feedback) or (success and self.feedback_when == "failed"):
            return None
        feedback = rollouts.feedback[i]
        return feedback if feedback and feedback.strip() else None

    def _choose(self, i: int, candidates: list[int], rollouts: Rollouts) -> int | None:
        if not candidates:
            return None
        if self.peer == "random":
            group = rollouts.group(i)
            content = (self.seed, i - group.start, rollouts.prompts[i], [rollouts.completion_ids[j] for j in group])
            return random.Random(repr(content)).choice(candidates)
        if self.peer == "shortest":
            return min(candidates, key=lambda j: len(rollouts.completion_ids[j]))
        if self.peer == "best":
            return max(candidates, key=lambda j: rollouts.scores[j] or 0.0)
        return candidates[0]


def without_thinking(text: str, tag: str | None) -> str:
    """`text` without its thinking: what stands between `tag` and its closing tag, for "<think>" "</think>".

    A closing tag that was never opened, as where the chat template opens the thinking, ends thinking that began with
    the text; an opening tag that was never closed, as in a truncated completion, begins thinking up to the end.
    """
    if tag is None:
        return text
    closing = f"{tag[0]}/{tag[1:]}"
    text = re.sub(rf"{re.escape(tag)}.*?{re.escape(closing)}\s*", "", text, flags=re.DOTALL)
    if closing in text:
        text = text.rpartition(closing)[2].lstrip()
    return text.partition(tag)[0]


def _template(name: str, source: str | None, default: str, slots: Mapping[str, bool]) -> Template:
    """The template of the key `name`; of its slots, the true ones must occur."""
    required = [slot for slot, needed in slots.items() if needed]
    return Template(
        default if source is None else source, key=f"teacher.context.{name}", slots=slots, required=required
    )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"teacher.context.{name}={value}: write one of {', '.join(choices)}{guess(value, choices)}")


def _check_token_budget(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(f"teacher.context.{name}={value}: write a number of tokens from 1, or null for no limit.")
