"""What is said: the number of seeds, the interval, in how many of them, and no word that so few seeds don't allow."""

import json
from pathlib import Path

import pytest

from selfdistill.comparison import compare, load_runs
from selfdistill.comparison.wording import is_decided, sentence, together, verdict
from selfdistill.comparison.writing import write
from tests.comparison.synthetic import write_run


def claims_of(folder: Path, *differences: float, other: tuple[float, ...] = ()) -> list[str]:
    """The sentences of a setting that differs by this much from the baseline in each seed, and of another one."""
    for seed, difference in enumerate(differences, start=1):
        write_run(folder / f"base-{seed}", {"alpha": 0, "seed": seed}, accuracy=0.5 + seed / 100, retention=None)
        accuracy = 0.5 + seed / 100 + difference
        write_run(folder / f"new-{seed}", {"alpha": 0.5, "seed": seed}, accuracy=accuracy, retention=None, minute=1)
    for seed, difference in enumerate(other, start=1):
        accuracy = 0.5 + seed / 100 + difference
        write_run(folder / f"other-{seed}", {"alpha": 1, "seed": seed}, accuracy=accuracy, retention=None, minute=2)
    (result,) = compare(load_runs(folder)).fields
    return [sentence(claim) for claim in result.claims]


def test_three_seeds_that_agree(tmp_path: Path) -> None:
    assert claims_of(tmp_path, 0.05, 0.06, 0.07) == [
        "alpha=0.5 has higher accuracy than alpha=0 by 0.060 [0.035, 0.085] (3 seeds, in 3 of 3); "
        "3 paired seeds cannot show p < 0.25."
    ]


def test_three_seeds_that_do_not(tmp_path: Path) -> None:
    assert claims_of(tmp_path, 0.05, -0.01, 0.05) == [
        "alpha=0.5 against alpha=0, accuracy: +0.030 [-0.056, 0.116]: not decided with 3 seeds: "
        "about 13 would be needed."
    ]


def test_a_loss_is_said_with_its_size(tmp_path: Path) -> None:
    (said,) = claims_of(tmp_path, -0.05, -0.06, -0.07)
    assert said.startswith("alpha=0.5 has lower accuracy than alpha=0 by 0.060 [0.035, 0.085]")


def test_one_seed_decides_nothing(tmp_path: Path) -> None:
    (said,) = claims_of(tmp_path, 0.2)
    assert said == ("alpha=0.5 against alpha=0, accuracy: +0.200: not decided with 1 seed, which shows no spread.")


def test_equal_differences_show_no_spread(tmp_path: Path) -> None:
    (said,) = claims_of(tmp_path, 0.05, 0.05, 0.05)
    assert "+0.050 in each of 3 seeds: not decided, since no spread was seen" in said


def test_from_six_seeds_on_there_is_a_p(tmp_path: Path) -> None:
    first, second = claims_of(tmp_path, 0.05, 0.06, 0.07, 0.05, 0.06, 0.07, other=(0.1, -0.1, 0.1, -0.1, 0.1, -0.1))
    assert "permutation p = 0.0312, 0.0625 after Holm's correction for 2" in first
    assert "not decided when all 2 comparisons are taken together" in first
    assert "cannot show" not in first
    assert "not decided with 6 seeds: more than 1,000 would be needed" in second


def test_holms_correction_is_said_for_what_was_tested(tmp_path: Path) -> None:
    six, few = (0.05, 0.06, 0.07, 0.05, 0.06, 0.07), (0.05, 0.06, 0.07)
    (tmp_path / "one").mkdir()
    first, second = claims_of(tmp_path / "one", *six, other=few)
    assert "permutation p = 0.0312, not corrected: of 2 comparisons no other has 6 pairs" in first
    assert "permutation" not in second
    (result,) = compare(load_runs(tmp_path / "one")).fields
    assert "(intervals widened by Bonferroni)" in together(result)
    for alpha, differences in ((1, six), (2, few)):
        for seed, difference in enumerate(differences, start=1):
            folder = tmp_path / "two" / f"more-{alpha}-{seed}"
            write_run(
                folder, {"alpha": alpha, "seed": seed}, accuracy=0.5 + seed / 100 + difference, retention=None, minute=3
            )
    first, second, third = claims_of(tmp_path / "two", *six)
    said = "permutation p = 0.0312, 0.0625 after Holm's correction for the 2 of 3 comparisons that have 6 pairs"
    assert said in first and said in second and "permutation" not in third
    (result,) = compare(load_runs(tmp_path / "two")).fields
    assert "(intervals widened by Bonferroni, p corrected by Holm for the 2 that have one)" in together(result)


def test_settings_that_share_no_seed_leave_the_best_undecided(tmp_path: Path) -> None:
    claims_of(tmp_path / "runs", 0.05, 0.06, 0.07)
    for seed in (4, 5, 6):
        write_run(tmp_path / "runs" / f"c-{seed}", {"alpha": 1, "seed": seed}, accuracy=0.4, retention=None, minute=2)
    comparison = compare(load_runs(tmp_path / "runs"))
    _, sure, _ = verdict(comparison.fields[0])
    assert sure == (
        "Not decided with 3 seeds: 1 of the 2 other settings may be as good, of which 1 shares no seed with it."
    )
    write(comparison, tmp_path / "report")
    assert "border-left: 5px solid var(--warn)" in (tmp_path / "report" / "report.html").read_text()
    assert not is_decided(comparison.fields[0])


@pytest.mark.parametrize(
    ("metric", "best"),
    [("distill/divergence", "alpha=0"), ("kl", "alpha=0"), ("monitor/sampler_gap", "alpha=0"), ("wall_s", "alpha=0"),
     ("eval/forgetting", "alpha=0"), ("reward/inverse_loss", "alpha=1"), ("monitor/entropy", "alpha=1")],
)  # fmt: skip
def test_the_best_is_the_lowest_of_what_is_better_low(tmp_path: Path, metric: str, best: str) -> None:
    for alpha in (0, 1):
        for seed in (1, 2):
            run = write_run(tmp_path / f"{alpha}-{seed}", {"alpha": alpha, "seed": seed})
            value = 0.1 + alpha + seed / 100
            (run / "metrics.jsonl").write_text(json.dumps({"step": 12, metric: value}))
            summary = json.loads((run / "summary.json").read_text()) | {"wall_s": value}
            summary["eval"]["after"]["eval/forgetting"] = value
            (run / "summary.json").write_text(json.dumps(summary))
    (result,) = compare(load_runs(tmp_path), metric=metric).fields
    assert result.rows[0].setting.label == best


def test_many_comparisons_are_said(tmp_path: Path) -> None:
    first, _ = claims_of(tmp_path, 0.05, 0.06, 0.09, other=(0.0, 0.1, 0.0))
    assert first.endswith("not decided when all 2 comparisons are taken together.")
    (result,) = compare(load_runs(tmp_path)).fields
    assert together(result).startswith("2 comparisons with the baseline for each metric")


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ((0.05, 0.06, 0.07), "Decided with 3 seeds: better than the other setting."),
        ((0.05, -0.01, 0.05), "Not decided with 3 seeds: the other setting may be as good."),
    ],
)
def test_the_verdict_says_which_and_how_sure(tmp_path: Path, differences: tuple[float, ...], said: str) -> None:
    claims_of(tmp_path, *differences)
    (result,) = compare(load_runs(tmp_path)).fields
    head, sure, _ = verdict(result)
    assert head.startswith("Highest accuracy: alpha=0.5 with 0.5")
    assert sure == said


def test_items_answered_by_both_are_said(tmp_path: Path) -> None:
    for alpha, right in ((0, [False] * 20), (1, [True] * 20)):
        write_run(tmp_path / str(alpha), {"alpha": alpha, "seed": 1}, verdicts=right, retention=None, minute=alpha)
    (result,) = compare(load_runs(tmp_path)).fields
    assert "on the same 20 items McNemar's exact p < 0.05 in 1 of 1 pairs of runs" in sentence(result.claims[0])
