"""The shipped weights do what their build log says."""

import json
from pathlib import Path

import pytest

from experiments.embedded_model.build import exam
from selfdistill.models.loading import load_model, resolve

FOLDER = Path(resolve("embedded"))


@pytest.fixture(scope="module")
def results() -> dict[str, float]:
    return exam(*load_model(name="embedded"), count=40)


@pytest.mark.long
def test_the_exam_of_the_log_is_passed_again(results):
    logged = json.loads((FOLDER / "build_log.json").read_text())[-1]["exams"][-1]
    for name, share in results.items():
        # 40 examples against 200: three standard errors, and some room at the ends
        assert share == pytest.approx(logged[name], abs=0.06 + 3 * (logged[name] * (1 - logged[name]) / 40) ** 0.5), (
            name
        )


def test_skills_come_in_grades(results):
    known = [results[name] for name in ("reverse", "shout", "initials", "last", "sort", "call")]
    assert min(known) > 0.75
    assert 0.1 < results["pick"] < 0.6
    assert results["near"] == results["far"] == 0
    assert min(share for name, share in results.items() if "_with_" in name) > 0.6


def test_it_is_small():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 8 * 2**20
