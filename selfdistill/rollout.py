"""What a batch of completions is: who was asked, what came back, how it was judged, and what the teacher is shown."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any

Message = dict[str, str]
Prompt = str | list[Message]


def text_of(message: Any) -> str:
    """The text of a prompt or completion: a string as it is, of messages the last one's content."""
    return message if isinstance(message, str) else message[-1]["content"]


def shown_in(columns: Mapping[str, Iterable[Any]], field: str) -> list[Any]:
    """A column's values. A row without a `golden_response` has its `answer` for a demonstration."""
    values = list(columns[field])
    if field != "golden_response" or "answer" not in columns:
        return values
    return [value if _holds_text(value) else answer for value, answer in zip(values, columns["answer"], strict=True)]


def _holds_text(value: Any) -> bool:
    return any(value) if isinstance(value, list | tuple) else bool(value)


@dataclass(repr=False)
class Rollouts:
    """One batch of completions, filled in on its way; the G completions of one prompt stand together.

    Attributes:
        prompts: one per rollout, as in the dataset: a string or a list of messages.
        columns: the dataset's other columns, one value per rollout.
        num_generations: G; rollouts `i` and `j` share a prompt when `i // G == j // G`.
        prompt_ids: what the student was asked, as token ids.
        demonstrated: which completions are demonstrations of the data and were not sampled.
        completions: decoded text without special tokens.
        completion_ids: the ids as they were sampled, EOS included where it was emitted. Nothing is tokenised again.
        policy_logps: the student's log-probabilities (B, T) of the completions, where they are known already.
        scores: weighted sum of the rewards; None where no reward applies.
        feedback: what the reward functions said about this very rollout.
        advantages: of the policy gradient, each rollout's mean over its tokens.
        teacher_prompts: what the teacher is shown; None for a rollout without a signal.
        sent_to_teacher: prompt and completion as token ids, as the teacher gets them; None where it gets nothing.
            Recorded at step 0 alone, since it takes all ids off the device.
    """

    prompts: Sequence[Prompt]
    completions: Sequence[str]
    completion_ids: Sequence[list[int]]
    columns: dict[str, list[Any]] = field(default_factory=dict)
    scores: Sequence[float | None] = ()
    feedback: Sequence[str | None] = ()
    num_generations: int = 1
    prompt_ids: Sequence[list[int]] = ()
    demonstrated: Sequence[bool] = ()
    policy_logps: Tensor | None = None
    advantages: Sequence[float] = ()
    teacher_prompts: Sequence[Prompt | None] = ()
    sent_to_teacher: Sequence[tuple[list[int], list[int]] | None] = ()

    @classmethod
    def of_rows(cls, rows: Sequence[dict[str, Any]], num_generations: int) -> "Rollouts":
        """Rows of the data that are about to be answered."""
        count = len(rows)
        return cls(
            prompts=[row["prompt"] for row in rows],
            completions=[""] * count,
            completion_ids=[[] for _ in rows],
            columns={name: [row[name] for row in rows] for name in rows[0] if name != "prompt"},
            scores=[None] * count,
            feedback=[None] * count,
            num_generations=num_generations,
            demonstrated=[False] * count,
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {len(self)} completions"

    def group(self, index: int) -> range:
        """The rollouts that share the prompt of rollout `index`, itself included."""
        start = index - index % self.num_generations
        return range(start, start + self.num_generations)

    def add_feedback(self, feedback: Sequence[str | None]) -> None:
        """What one more reward function says of each rollout, on a line of its own."""
        said = [list(filter(None, parts)) for parts in zip(self.feedback, feedback, strict=True)]
        self.feedback = ["\n".join(parts) or None for parts in said]

    def gathered(self, gather: Callable[[list[Any]], list[Any]]) -> "Rollouts":
        """Those of all processes, in the order of the processes; log-probabilities are left out.

        Args:
            gather: joins the lists that the processes give, such as `accelerate.utils.gather_object`.
        """
        lists: dict[str, Any] = {
            f.name: gather(list(getattr(self, f.name)))
            for f in fields(self)
            if f.name not in ("columns", "num_generations", "policy_logps")
        }
        columns = {name: gather(list(self.columns[name])) for name in sorted(self.columns)}
        return Rollouts(columns=columns, num_generations=self.num_generations, **lists)
