"""Transfer and forgetting between tasks, against their definitions written out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdistill.evaluation.transfer import AccuracyMatrix

TASKS = ("a", "b", "c")
ROWS = [
    {"a": 0.1, "b": 0.2, "c": 0.0},
    {"a": 0.8, "b": 0.3, "c": 0.1},
    {"a": 0.9, "b": 0.7, "c": 0.4},
    {"a": 0.5, "b": 0.8, "c": 0.6},
]


def test_by_hand() -> None:
    found = AccuracyMatrix(TASKS, ROWS).measures()
    assert found["eval/accuracy"] == pytest.approx((0.5 + 0.8 + 0.6) / 3)
    assert found["eval/learned"] == pytest.approx((0.8 + 0.7 + 0.6) / 3)
    assert found["eval/backward_transfer"] == pytest.approx(((0.5 - 0.8) + (0.8 - 0.7)) / 2)
    assert found["eval/forward_transfer"] == pytest.approx(((0.3 - 0.2) + (0.4 - 0.0)) / 2)
    # The first task was best after the second one's stage.
    assert found["eval/task_forgetting"] == pytest.approx(((0.9 - 0.5) + (0.7 - 0.8)) / 2)


@given(st.integers(2, 5).flatmap(lambda n: st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=n + 1, max_size=n + 1)))  # fmt: skip # noqa: E501
def test_against_the_formulas(r: list[list[float]]) -> None:
    """R[k][j] with the formulas' own indices: k from 0, the start, and j from 1."""
    count = len(r) - 1
    names = [f"task {j}" for j in range(1, count + 1)]
    found = AccuracyMatrix(names, [dict(zip(names, row, strict=True)) for row in r]).measures()

    def accuracy(k: int, j: int) -> float:
        return r[k][j - 1]

    backward = sum(accuracy(count, j) - accuracy(j, j) for j in range(1, count)) / (count - 1)
    forward = sum(accuracy(j - 1, j) - accuracy(0, j) for j in range(2, count + 1)) / (count - 1)
    lost = [max(accuracy(k, j) for k in range(1, count)) - accuracy(count, j) for j in range(1, count)]
    assert found["eval/backward_transfer"] == pytest.approx(backward)
    assert found["eval/forward_transfer"] == pytest.approx(forward)
    assert found["eval/task_forgetting"] == pytest.approx(sum(lost) / (count - 1))


def test_one_task_has_no_transfer() -> None:
    assert AccuracyMatrix(["a"], [{"a": 0.0}, {"a": 1.0}]).measures() == {"eval/accuracy": 1.0, "eval/learned": 1.0}


def test_what_is_not_trained_yet_has_no_measures() -> None:
    matrix = AccuracyMatrix(TASKS, ROWS[:2])
    assert not matrix.is_complete
    assert matrix.average_accuracy() == pytest.approx(0.4)
    with pytest.raises(ValueError, match="1 of 3 stages are done"):
        matrix.measures()
    with pytest.raises(ValueError, match="no accuracy of c"):
        AccuracyMatrix(TASKS, [{"a": 0.1, "b": 0.2}])
    with pytest.raises(ValueError, match="0 rows for 3 tasks"):
        AccuracyMatrix(TASKS, [])
