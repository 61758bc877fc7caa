"""What may have been meant."""

import pytest

from selfdistill.config.suggestions import closest, guess, nearest


@pytest.mark.parametrize(
    ("word", "choices", "wanted"),
    [
        ("seeed", ["seed", "beta"], "seed"),
        ("Answr", ["id", "ANSWER"], "ANSWER"),
        ("golden", ["answer", "golden_response"], "golden_response"),
        ("prompt", ["output"], None),
        ("zzz", ["seed"], None),
        ("zzz", [], None),
    ],
)
def test_nearest(word: str, choices: list[str], wanted: str | None) -> None:
    assert nearest(word, choices) == wanted


def test_a_guess_ends_the_sentence() -> None:
    assert guess("jsnl", ("csv", "jsonl")) == "; did you mean jsonl?"
    assert guess("zzz", ("csv", "jsonl")) == "."


def test_closest_names_what_there_is() -> None:
    assert closest("seeed", ["seed", "beta"]) == "did you mean seed?"
    assert closest("zzz", ["seed", "beta", "_hidden"]) == "known here: beta, seed"
    assert closest("hiddn", ["_hidden"]) == "nothing can be set here"
    assert closest("zzz", []) == "nothing can be set here"


def test_closest_of_many_names_the_most_similar() -> None:
    shown = closest("zz4", [f"key{i}" for i in range(50)])
    assert shown.count(",") == 12 and "key4" in shown
