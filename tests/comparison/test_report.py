"""The command and the files that it leaves."""

import csv
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from selfdistill import compare
from selfdistill.comparison import charts, load_runs, report
from selfdistill.comparison import compare as compare_runs
from selfdistill.comparison.drawing import render
from tests.command import command
from tests.comparison.synthetic import write_run, write_sweep

HEADINGS = [
    "What can be claimed",
    "The runs",
    "New skill against retention",
    "Learning curves: every seed thin, the mean bold",
    "What each key does",
    "Health",
    "What was left out, and why",
    "Where the numbers come from",
]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four settings with two seeds, one run that failed, and its report."""
    folder = tmp_path_factory.mktemp("it's a sweep")
    grid = [{"alpha": alpha, "beta": beta} for alpha in (0, 1) for beta in (0.0, 0.1)]
    write_sweep(folder, grid, (1, 2))
    alarm = {"monitor": "length", "step": 3, "message": "length: <b>long</b>", "action": "warn"}
    failed = {"experiment": "sdpo", "alpha": 1, "beta": 0.1, "seed": 3}
    write_run(folder / "failed", failed, status="failed", error="ValueError: <script>alert(1)</script>", alarms=[alarm])
    (folder / "report" / "plots").mkdir(parents=True)
    (folder / "report" / "plots" / "of_another_time.png").write_bytes(b"")
    report(folder)
    assert len(load_runs(folder).runs) == 9  # the report is no run
    return folder / "report"


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take seconds."""
    monkeypatch.setattr(charts, "charts", lambda comparison: iter(()))


class _Page(HTMLParser):
    """Its headings, the numbers of its pictures and tables, and every address that it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self._heading = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._heading = tag == "h2"
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        if self._heading:
            self.headings.append(data)
        self._heading = False


def test_the_page_is_one_file_in_the_promised_order(sweep: Path) -> None:
    text = (sweep / "report.html").read_text()
    page = _Page(text)
    assert page.headings == HEADINGS
    assert len(text.encode()) < 500_000
    assert all(address.startswith("#") for address in page.addresses)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)
    assert "@import" not in text and "fetch(" not in text
    assert '<meta name="viewport" content="width=device-width' in text
    assert "prefers-color-scheme: dark" in text
    assert page.tags.count("svg") == len(list((sweep / "plots").glob("*.png")))
    levels = json.loads((sweep / "report.json").read_text())["fields"][0]["settings"]
    for level in levels:  # as the heat map has them
        assert f">{level['metrics']['eval/accuracy']['mean']:.3f}</text>" in text
    # what runs say is text, never part of the page
    assert "<script>alert" not in text and "<b>long" not in text
    assert "ValueError: &lt;script&gt;" in text


def test_a_heat_map_of_drawn_numbers_has_classes_of_equally_many(tmp_path: Path) -> None:
    for number in range(30):  # as a search draws them, with one result each
        drawn = {"alpha": round(0.01 + number / 33, 4), "beta": round(0.9**number, 6), "seed": 1}
        write_run(tmp_path / f"run-{number}", drawn, accuracy=number / 100)
    comparison = compare_runs(load_runs(tmp_path))
    svg = render(next(one for one in charts.charts(comparison) if one.name.startswith("heat")), tmp_path)
    classes = charts._classes(comparison.fields[0], "alpha")
    assert len(classes) == 30
    assert list(dict.fromkeys(classes.values()))[:2] == ["0.01 to 0.16", "0.19 to 0.34"]
    assert all(f">{text}<" in svg for text in classes.values())
    for mean in (0.025, 0.265):  # of the first six and of the last six, in each of their classes of beta
        assert f">{mean:.3f}<" in svg


def test_a_heat_map_of_many_words_shows_those_of_the_best(tmp_path: Path) -> None:
    for number in range(20):
        drawn = {"experiment": f"e{number}", "alpha": number % 2, "seed": 1}
        write_run(tmp_path / f"run-{number}", drawn, accuracy=number / 100)
    (result,) = compare_runs(load_runs(tmp_path)).fields
    assert set(charts._classes(result, "experiment")) == {f"e{number}" for number in range(8, 20)}


def test_colours_are_the_pages_own(sweep: Path) -> None:
    text = (sweep / "report.html").read_text()
    assert "var(--c0)" in text and "var(--ink)" in text
    assert "#24292e" not in re.sub(r":root {.*?}", "", text, flags=re.S)


def test_curves_are_drawn_over_steps_tokens_and_seconds(sweep: Path) -> None:
    names = {file.stem for file in (sweep / "plots").glob("*.png")}
    assert {"curves_reward_step", "curves_reward_tokens_generated", "curves_reward_seconds"} <= names
    assert {"settings", "how_sure", "skill_and_retention", "heat_alpha_beta", "health_time"} <= names
    assert {"effect_eval_accuracy_alpha", "effect_eval_retention_beta"} <= names


def test_the_other_files_say_the_same(sweep: Path) -> None:
    content = json.loads((sweep / "report.json").read_text())
    with (sweep / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    markdown = (sweep / "report.md").read_text()
    assert len(content["runs"]) == len(rows) == 9
    assert {row["status"] for row in rows} == {"finished", "failed"}
    assert rows[-1]["reason"].startswith("failed: at step 6 of 12: ValueError")
    assert list(rows[0])[1:5] == ["run", "alpha", "beta", "seed"]  # only the keys that differ
    for line in content["text"]:
        assert line in markdown
    claims = content["fields"][0]["claims"]
    assert all(
        claim["sentence"] in (sweep / "report.html").read_text().replace("&#39;", "'")
        for claim in claims
        if claim["kind"] != "best" and "<" not in claim["sentence"]
    )
    assert content["origin"]["commit"] == ["c0ffee"]
    assert "![New skill against old ones" in markdown


def test_the_command_takes_folders_and_globs_in_hydras_grammar(tmp_path: Path, no_pictures: None) -> None:
    write_sweep(tmp_path / "a b=c", [{"alpha": 0}, {"alpha": 1}], (1, 2))
    outcome = command(["a b=c", "baseline=alpha=1", "output=out"], tmp_path, compare)
    assert (outcome.code, outcome.err) == (0, "")
    assert "Highest accuracy: alpha=1" in outcome.out
    assert "out/report.html" in outcome.left
    assert "compared with the baseline alpha=1" in (tmp_path / "out" / "report.html").read_text()
    outcome = command(["a b=c/run-0-*", "by=[]", "output=out2"], tmp_path, compare)
    assert outcome.code == 0 and "There is nothing to compare" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: there is no such folder."),
        ([], "runs is missing: write runs=… on the command line."),
        (["sweep", "by=gamma"], "by=gamma: the runs do not differ in it; known here: alpha"),
        (["sweep", "metric=eval/acuracy"], "metric=eval/acuracy: no run has it; known here: "),
        (["sweep", "bsaeline=x"], "bsaeline is not a key: did you mean baseline?"),
        (["sweep", "output=sweep/run-0-1/config.yaml"], "the report cannot be written: "),
        (["sweep", "--multirun"], "--multirun is for selfdistill.train alone."),
    ],
)
def test_mistakes_are_one_message(no_pictures: None, tmp_path: Path, arguments: list[str], said: str) -> None:
    write_sweep(tmp_path / "sweep", [{"alpha": 0}, {"alpha": 1}], (1,))
    outcome = command(arguments, tmp_path, compare)
    assert outcome.code == 2
    assert said in outcome.err
    assert outcome.left == set()


def test_runs_that_failed_before_their_first_step_are_listed_with_their_reasons(
    tmp_path: Path, no_pictures: None
) -> None:
    for seed in (1, 2):
        failed = {"status": "failed", "error": f"RuntimeError: no reward {seed}"}
        run = write_run(tmp_path / "sweep" / f"run-{seed}", {"seed": seed}, **failed)
        (run / "metrics.jsonl").unlink()
    job = '{"job": 9, "overrides": ["seed=3"], "status": "refused", "message": "seed=3 is out of range."}\n'
    (tmp_path / "sweep" / "jobs.jsonl").write_text(job)
    for number, folder in enumerate((tmp_path / "sweep", tmp_path / "refused")):
        if number:  # not one of its jobs came as far as to a folder
            folder.mkdir()
            (folder / "jobs.jsonl").write_text(job)
        outcome = command([folder.name], tmp_path, compare)
        assert (outcome.code, outcome.err) == (0, "")
        assert "No run finished" in outcome.out
        content = json.loads((folder / "report" / "report.json").read_text())
        reasons = [
            "failed: at step 0 of 12: RuntimeError: no reward 1",
            "failed: at step 0 of 12: RuntimeError: no reward 2",
        ]
        reasons = [*([] if number else reasons), "refused: seed=3 is out of range."]
        assert [run["reason"] for run in content["runs"]] == reasons
        assert [one["why"] for one in content["left_out"]] == reasons
        assert all(reason in (folder / "report" / "report.html").read_text() for reason in reasons)


@pytest.mark.parametrize(
    ("runs", "place"),
    [
        ("all/*/run-*", "all/report"),
        ("all/a/run-0-*", "all/a/report"),
        ("al?/a/run-0-1", "report"),
        ("all/a", "all/a/report"),
        ("all/a/run-0-1", "all/a/report"),
    ],
)
def test_the_report_of_a_glob_lies_above_its_first_wildcard(
    tmp_path: Path, no_pictures: None, runs: str, place: str
) -> None:
    for name in ("a", "b"):
        write_sweep(tmp_path / "all" / name, [{"alpha": 0}, {"alpha": 1}], (1,))
    outcome = command([runs], tmp_path, compare)
    assert (outcome.code, outcome.err) == (0, "")
    assert {str(Path(file).parent) for file in outcome.left if file.endswith("report.html")} == {place}


def test_nothing_finished_is_said_and_no_error(tmp_path: Path, no_pictures: None) -> None:
    write_run(tmp_path / "run", {"seed": 1}, status="failed", error="RuntimeError: no")
    outcome = command([".", "output=out"], tmp_path, compare)
    assert outcome.code == 0, outcome.err
    assert "No run finished" in outcome.out
    assert "RuntimeError: no" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.long
def test_nothing_imports_torch() -> None:
    code = "import sys, selfdistill.compare, selfdistill.comparison.charts, selfdistill.comparison.terminal as t"
    code += "; print([name for name in ('torch', 'transformers', 'trl', 'wandb') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.long
def test_a_thousand_runs_stay_a_small_page(tmp_path: Path) -> None:
    grid = [{"alpha": alpha / 10, "beta": beta / 10} for alpha in range(10) for beta in range(10)]
    write_sweep(tmp_path, grid, range(10), steps=20)
    report(tmp_path)
    assert (tmp_path / "report" / "report.html").stat().st_size < 500_000
