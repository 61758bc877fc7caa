"""Studies: their sweeps are ones that Hydra composes, and their pages say what `selfdistill.compare` says of them."""

import importlib.util
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests.command import command, options
from tests.comparison.synthetic import write_run, write_sweep
from tests.reference import ROOT

EXPERIMENTS = ROOT / "experiments"
# A study whose page has no marks has a way of its own to show what it found.
PAGES = sorted(page for page in EXPERIMENTS.rglob("README.md") if "<!-- compare " in page.read_text())
SWEEPS = [sweep for page in PAGES for sweep in sorted(page.parent.glob("conf/sweep/*.yaml"))]
NAMES = [f"{sweep.parents[2].relative_to(EXPERIMENTS)}/{sweep.stem}" for sweep in SWEEPS]


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """The script that writes the pages."""
    return script(EXPERIMENTS / "studies" / "page.py")


@pytest.mark.parametrize("sweep", SWEEPS, ids=NAMES)
def test_a_sweep_has_as_many_runs_as_it_says(sweep: Path) -> None:
    text = sweep.read_text()
    said = re.search(r"; (\d+) runs\.", text)
    assert said, "its first lines say how many runs it has"
    params = yaml.safe_load(text)["hydra"]["sweeper"]["params"]
    assert math.prod(len(str(values).split(",")) for values in params.values()) == int(said[1])


@pytest.mark.parametrize("sweep", SWEEPS, ids=NAMES)
def test_a_sweep_is_not_hidden_by_one_of_the_same_name(sweep: Path) -> None:
    """The program's own options win over those of --config-dir."""
    assert sweep.stem not in options("sweep")


@pytest.mark.long
@pytest.mark.parametrize("sweep", SWEEPS, ids=NAMES)
def test_a_sweep_is_checked(sweep: Path, tmp_path: Path) -> None:
    from selfdistill.models.loading import resolve

    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "released").symlink_to(resolve("embedded"))
    asked = ["--config-dir", str(sweep.parents[1]), f"sweep={sweep.stem}", "check=true"]
    outcome = command(asked, tmp_path)
    said = re.search(r"; (\d+) runs\.", sweep.read_text())
    assert outcome.code == 0, outcome.err
    assert said and f"{said[1]} jobs checked" in outcome.out


@pytest.mark.parametrize("name", NAMES)
def test_every_sweep_has_its_place_in_the_page(name: str, page: ModuleType) -> None:
    text = (EXPERIMENTS / name).parent.joinpath("README.md").read_text()
    blocks = [page.asked(words) for _, words, *_ in page.MARK.findall(text)]
    assert [f"outputs/{name}"] in [mark.paths for mark in blocks if not {"claim", "stopped"} & set(mark.options)]


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.parent.name)
def test_the_marks_of_a_page_name_sweeps(file: Path, page: ModuleType) -> None:
    text = file.read_text()
    marks = [page.asked(words) for _, words, *_ in page.MARK.findall(text)]
    assert text.count("<!-- compare ") == text.count("<!-- end -->") == len(marks)
    named = {path for mark in marks for path in mark.paths}
    of_commands = {"outputs/sdpo_grid"}  # whose command stands in experiments/comparison
    assert named <= {f"outputs/{name}" for name in NAMES} | of_commands


@pytest.mark.parametrize("name", sorted(path.parents[1].name for path in EXPERIMENTS.glob("studies/*/conf/sweep")))
def test_make_study_ends_with_the_page(name: str) -> None:
    command = ["make", "--no-print-directory", "-n", "study", f"NAME={name}"]  # `make test` would have it print more
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    study = f"experiments/studies/{name}"
    own = (ROOT / study / "summarise.py").is_file()
    last = f"{study}/summarise.py outputs/studies/{name}" if own else f"page.py {study}/README.md"
    assert done.stdout.rstrip().endswith(last)
    assert f"folder=outputs/studies/{name}/$sweep" in done.stdout
    assert own or EXPERIMENTS / "studies" / name / "README.md" in PAGES


def script(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_the_study_of_sequences_has_a_page_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summarise = script(EXPERIMENTS / "studies" / "continual" / "summarise.py")
    sweep = tmp_path / "outputs" / "continual"
    write_sweep(sweep, [{"experiment": method} for method in summarise.METHODS], (1, 2))
    report = {"tasks": ["a", "b"], "stages": ["start", "after a", "after b"], "accuracy": [[0.1, 0.2]] * 3}
    for folder in {file.parent for file in sweep.rglob("summary.json")}:
        (folder / "sequence.json").write_text(json.dumps(report))
        summary = json.loads((folder / "summary.json").read_text())
        summary["eval"]["after"] |= dict.fromkeys(summarise.MEASURES, 0.5)
        (folder / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "README.md").write_text(f"Before. {summarise.BEGIN} old {summarise.END} After.")
    monkeypatch.setattr(summarise, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["summarise.py", str(tmp_path / "outputs")])
    summarise.main()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("Before.") and text.endswith("After.") and f"{summarise.BEGIN} old" not in text
    assert all(f"| {name} | 1 2 | " in text for name in summarise.METHODS.values())
    assert (tmp_path / "matrices.png").is_file() and (tmp_path / "results.csv").is_file()


def written(page: ModuleType, folder: Path, words: str) -> str:
    """What stands between the marks of a page once it is written; it stays the same when it is written again."""
    file = folder / "README.md"
    file.write_text(f"Before. <!-- compare {words} --> old <!-- end --> After.\n")
    page.write(file)
    once = file.read_text()
    page.write(file)
    assert file.read_text() == once
    found = re.fullmatch(r"Before\. <!-- compare (.*?) -->\s(.*)\s<!-- end --> After\.\n", once, re.DOTALL)
    assert found and found[1] == words
    return found[2]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "made_up"
    write_sweep(folder, [{"alpha": 0}, {"alpha": 1}], (1, 2, 3))
    return shlex.quote(str(folder))


def test_a_block_has_every_seed(page: ModuleType, sweep: str, tmp_path: Path) -> None:
    text = written(page, tmp_path, sweep)
    rows = (tmp_path / "results" / "made_up.csv").read_text().splitlines()
    assert len(rows) == 7
    accuracies = sorted(f"{float(row.split(',')[5]):.3f}" for row in rows[1:] if row.split(",")[1] == "1")
    (line,) = [line for line in text.splitlines() if line.startswith("| `alpha=1`")]
    assert sorted(line.split("|")[2].split()) == accuracies
    assert "alpha=1 has higher accuracy than alpha=0 by" in text
    assert "Before training: accuracy 0.300." in text
    assert (tmp_path / "results" / "made_up.png").is_file()


@pytest.mark.parametrize(("expected", "verdict"), [("higher", "Holds."), ("lower", "Does not hold")])
def test_a_claim_is_judged(page: ModuleType, sweep: str, tmp_path: Path, expected: str, verdict: str) -> None:
    text = written(page, tmp_path, f"{sweep} baseline=alpha=0 claim=alpha=1 expected={expected}")
    assert re.match(r"accuracy 0\.\d+ against 0\.\d+: alpha=1 has higher accuracy than alpha=0 by", text)
    assert f"**{verdict}" in text


def test_a_claim_that_few_seeds_leave_open(page: ModuleType, tmp_path: Path) -> None:
    for number, (alpha, accuracy) in enumerate([(0, 0.5), (0, 0.7), (1, 0.6), (1, 0.6)]):
        seeded = {"alpha": alpha, "seed": number % 2}
        write_run(tmp_path / "runs" / str(number), seeded, accuracy=accuracy, minute=number)
    runs = shlex.quote(str(tmp_path / "runs"))
    assert "**Not decided.**" in written(page, tmp_path, f"{runs} baseline=alpha=0 claim=alpha=1 expected=higher")


def test_a_claim_against_the_start(page: ModuleType, sweep: str, tmp_path: Path) -> None:
    text = written(page, tmp_path, f"{sweep} baseline=start claim=alpha=0 expected=lower")
    assert "alpha=0 has higher accuracy than the start (0.300) by" in text
    assert "**Does not hold" in text


def test_runs_without_a_spread_are_judged_by_their_items(page: ModuleType, tmp_path: Path) -> None:
    for seed in (1, 2):
        run = write_run(tmp_path / "runs" / str(seed), {"seed": seed}, accuracy=0.0, verdicts=[False] * 10)
        before = [{"step": 0, "suite": None, "row": row, "prompt": f"p{row}", "verdict": row < 6} for row in range(10)]
        with (run / "evaluation.jsonl").open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in before))
    asked = f"{shlex.quote(str(tmp_path / 'runs'))} baseline=start claim='all runs'"
    assert "p < 0.05 in 2 of 2 pairs of runs. **Holds for each" in written(page, tmp_path, f"{asked} expected=lower")
    assert written(page, tmp_path, f"{asked} expected=higher").endswith("**Not decided.**")


def test_stopped_runs_are_counted(page: ModuleType, tmp_path: Path) -> None:
    alarm = {"monitor": "entropy", "step": 6, "action": "stop", "message": "too low"}
    for seed in (1, 2):
        write_run(tmp_path / "runs" / f"0-{seed}", {"alpha": 0, "seed": seed})
        watched = {"status": "stopped", "alarms": [alarm]} if seed == 1 else {"alarms": [{**alarm, "action": "warn"}]}
        summary = write_run(tmp_path / "runs" / f"1-{seed}", {"alpha": 1, "seed": seed}, **watched) / "summary.json"
        summary.write_text(summary.read_text().replace('"eval": {}', '"eval": {"after": {"eval/retention": 0.25}}'))
    runs = shlex.quote(str(tmp_path / "runs"))
    assert written(page, tmp_path, f"{runs} stopped=alpha=1") == (
        "1 of 2 runs were stopped: entropy at step 6 (retention 0.250 by then)."
    )
    assert written(page, tmp_path, f"{runs} stopped=alpha=0") == "0 of 2 runs were stopped: by no monitor."


def test_what_was_not_run_stays(page: ModuleType, tmp_path: Path) -> None:
    assert written(page, tmp_path, "outputs/never/run claim=alpha=1") == "old"


def test_what_is_not_over_stays(page: ModuleType, tmp_path: Path) -> None:
    for seed, status in enumerate(("finished", "finished", "running")):
        write_run(tmp_path / "runs" / str(seed), {"alpha": seed % 2, "seed": seed}, status=status)
    assert written(page, tmp_path, shlex.quote(str(tmp_path / "runs"))) == "old"


@pytest.mark.parametrize("words", ["claims=alpha=1", "claim=alpha=7"])
def test_a_mark_that_asks_for_what_is_not_there(page: ModuleType, sweep: str, tmp_path: Path, words: str) -> None:
    with pytest.raises(SystemExit, match=words.partition("=")[0]):
        written(page, tmp_path, f"{sweep} {words}")
