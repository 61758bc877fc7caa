"""What tasks that follow each other do to one another: the matrix of accuracies, and what is read from it.

R[k][j] is the accuracy on task j after stage k, with k = 0 the start and stage j (from 1) the one that trains task j; T
tasks in all. The definitions are those of

- Lopez-Paz & Ranzato 2017, Gradient Episodic Memory, arXiv 1706.08840, equations 2 to 4: average accuracy, backward and
  forward transfer. Their baseline of forward transfer is a model at random initialisation, here it is the start.
- Chaudhry et al. 2018, Riemannian Walk, arXiv 1801.10112, section 5: forgetting.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class AccuracyMatrix:
    """Accuracies by stage and task.

    Attributes:
        tasks: in the order in which they are trained.
        rows: the accuracy on each task by name, at the start and after each stage so far.

    Raises:
        ValueError: no row, more rows than stages, or a row without one of the tasks.
    """

    tasks: Sequence[str]
    rows: Sequence[Mapping[str, float]]

    def __post_init__(self) -> None:
        if not 1 <= len(self.rows) <= len(self.tasks) + 1:
            raise ValueError(f"{len(self.rows)} rows for {len(self.tasks)} tasks: one of the start and one a stage")
        for row in self.rows:
            if missing := set(self.tasks) - row.keys():
                raise ValueError(f"a row has no accuracy of {', '.join(sorted(missing))}")

    @property
    def is_complete(self) -> bool:
        """Whether every task was trained."""
        return len(self.rows) == len(self.tasks) + 1

    def average_accuracy(self, stage: int = -1) -> float:
        """Mean over all tasks of R[stage][j]; of the last row by default."""
        return fmean(self.rows[stage][task] for task in self.tasks)

    def measures(self) -> dict[str, float]:
        """What the whole sequence shows; transfer and forgetting take two tasks.

        Returns:
            `eval/accuracy`            mean over j of R[T][j]
            `eval/learned`             mean over j of R[j][j]: each task right after its own stage
            `eval/backward_transfer`   mean over j < T of R[T][j] - R[j][j]; below 0 is forgetting
            `eval/forward_transfer`    mean over j > 1 of R[j-1][j] - R[0][j]
            `eval/task_forgetting`     mean over j < T of max over 1 <= k < T of R[k][j], minus R[T][j]

        Raises:
            ValueError: a task is not trained yet.
        """
        if not self.is_complete:
            raise ValueError(f"{len(self.rows) - 1} of {len(self.tasks)} stages are done")
        own = [self.rows[stage][task] for stage, task in enumerate(self.tasks, start=1)]
        found = {"eval/accuracy": self.average_accuracy(), "eval/learned": fmean(own)}
        if len(self.tasks) > 1:
            last, earlier, later = self.rows[-1], self.tasks[:-1], self.tasks[1:]
            found["eval/backward_transfer"] = fmean(last[task] - then for task, then in zip(earlier, own))
            found["eval/forward_transfer"] = fmean(
                self.rows[stage][task] - self.rows[0][task] for stage, task in enumerate(later, start=1)
            )
            found["eval/task_forgetting"] = fmean(
                max(row[task] for row in self.rows[1:-1]) - last[task] for task in earlier
            )
        return found
