"""What a batch of completions is: who was asked, what came back, and how it was judged."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]
Prompt = str | list[Message]


def text_of(message: Any) -> str:
    """The text of a prompt or completion: a string as it is, of messages the last one's content."""
    return message if isinstance(message, str) else message[-1]["content"]


@dataclass
class Rollouts:
    """Completions of one batch; the G completions of one prompt stand together.

    Attributes:
        prompts: one per rollout, as in the dataset: a string or a list of messages.
        completions: decoded text without special tokens.
        completion_ids: the ids as they were sampled, EOS included where it was emitted. Nothing is ever tokenised again.
        columns: the dataset's other columns, one value per rollout.
        scores: weighted sum of the rewards; None where no reward applies.
        feedback: what the reward function said about this very rollout.
        num_generations: G; rollouts `i` and `j` share a prompt when `i // G == j // G`.
    """

    prompts: Sequence[Prompt]
    completions: Sequence[str]
    completion_ids: Sequence[list[int]]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    scores: Sequence[float | None] = ()
    feedback: Sequence[str | None] = ()
    num_generations: int = 1

    def __len__(self) -> int:
        return len(self.prompts)

    def group(self, index: int) -> range:
        """The rollouts that share the prompt of rollout `index`, itself included."""
        start = index - index % self.num_generations
        return range(start, start + self.num_generations)
