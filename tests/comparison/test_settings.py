"""Which runs are repetitions of a setting, which may be compared, and what is left out and why."""

import json
from pathlib import Path

import pytest

from selfdistill.comparison import compare, load_runs
from selfdistill.comparison.analysis import FieldResult
from selfdistill.comparison.settings import shown, sort_runs
from selfdistill.comparison.statistics import wilson
from selfdistill.comparison.tables import runs_table
from selfdistill.errors import UserError
from tests.comparison.synthetic import SMALL, write_run, write_sweep

SEEDS = (1, 2, 3)


def values(result: FieldResult) -> list[dict[str, str]]:
    return [row.setting.values for row in result.rows]


def test_settings_are_all_keys_but_the_seed(tmp_path: Path) -> None:
    write_sweep(tmp_path, [{"alpha": 0, "beta": 0.04}, {"alpha": 1, "beta": 0.04}], SEEDS)
    (result,) = compare(load_runs(tmp_path)).fields
    # distillation.alpha and data.seed follow other keys, and so tell nothing
    assert result.field.knobs == ["alpha"]
    assert values(result) == [{"alpha": "1"}, {"alpha": "0"}]
    assert [row.setting.seeds for row in result.rows] == [["1", "2", "3"]] * 2
    assert result.baseline.label == "alpha=0"  # the first that was started
    assert [claim.first for claim in result.claims] == ["alpha=1", "alpha=1"]
    assert result.claims[0].better


def test_a_seed_that_only_some_methods_have_makes_no_setting(tmp_path: Path) -> None:
    """A teacher's context has the run's seed; a run without a teacher has none."""
    for seed in SEEDS:
        write_run(tmp_path / f"grpo-{seed}", {"experiment": "grpo", "seed": seed})
        taught = {**SMALL, "teacher.context.seed": seed}
        write_run(tmp_path / f"sdpo-{seed}", {"experiment": "sdpo", "seed": seed}, base=taught, minute=1)
    (result,) = compare(load_runs(tmp_path)).fields
    assert values(result) == [{"experiment": "grpo"}, {"experiment": "sdpo"}]
    assert [row.setting.seeds for row in result.rows] == [["1", "2", "3"]] * 2


def test_the_same_number_in_two_ways_of_writing_is_one_setting(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"alpha": 1, "seed": 1})
    write_run(tmp_path / "b", {"alpha": 1.0, "seed": 2})
    (result,) = compare(load_runs(tmp_path)).fields
    assert values(result) == [{}]


def test_a_group_that_was_chosen_is_a_key(tmp_path: Path) -> None:
    for seed in SEEDS:
        write_run(tmp_path / f"sdpo-{seed}", {"experiment": "sdpo", "seed": seed})
        write_run(tmp_path / f"sft-{seed}", {"experiment": "sft", "seed": seed, "policy_weight": 1.0, "beta": 0.1})
    (result,) = compare(load_runs(tmp_path)).fields
    # what was written on the command line is shown, what follows from the choice is not
    assert values(result)[0].keys() == {"experiment", "policy_weight", "beta"}


@pytest.mark.parametrize(
    ("key", "value"),
    [("data.path", "other.jsonl"), ("eval.max_rows", 20), ("model.name", "other"), ("completions_per_step", 64)],
)
def test_runs_under_other_conditions_are_not_compared_unless_told(tmp_path: Path, key: str, value: object) -> None:
    write_sweep(tmp_path / "one", [{"alpha": 0}, {"alpha": 1}], SEEDS)
    write_sweep(tmp_path / "two", [{"alpha": 0, key: value}], SEEDS)
    found = load_runs(tmp_path)
    first, second = compare(found).fields
    assert len(first.field.runs) == 6 and len(second.field.runs) == 3
    assert second.field.conditions.keys() == {key}
    assert all(key not in row.setting.values for row in first.rows)
    for told in ({"force": True}, {"by": [key]}):
        (result,) = compare(found, **told).fields
        assert len(result.field.runs) == 9


def provenance(**files: str) -> dict[str, dict[str, dict[str, object]]]:
    """As runs write it, with these hashes."""
    hashes = {"data": "aa", "model": "bb"} | files
    return {
        "data": {
            "data/train.jsonl": {"bytes": 47757, "blake2b": hashes["data"]},
            "embedded:retention": {"bytes": 78182, "blake2b": "cc"},
        },
        "model": {"model.safetensors": {"bytes": 3208424, "blake2b": hashes["model"]}},
    }


@pytest.mark.parametrize("what", ["data", "model"])
def test_other_content_behind_the_same_path_is_not_averaged(tmp_path: Path, what: str) -> None:
    for seed in SEEDS:
        for content in ("old", "new"):
            told = {"seed": seed}
            write_run(tmp_path / f"{content}-{seed}", told, provenance=provenance(**{what: content}))
    first, second = compare(load_runs(tmp_path)).fields
    assert first.field.conditions.keys() == {f"{what}.fingerprint"}
    assert [len(one.field.runs) for one in (first, second)] == [3, 3]
    (told_to,) = compare(load_runs(tmp_path), by=[what]).fields
    assert [row.setting.seeds for row in told_to.rows] == [["1", "2", "3"]] * 2


def test_what_runs_wrote_down_is_believed_beside_those_that_wrote_nothing(tmp_path: Path) -> None:
    """A job that was refused has no folder, and a finished run without a fingerprint may have had any data."""
    for content in ("old", "new"):
        for seed in SEEDS:
            write_run(tmp_path / f"{content}-{seed}", {"seed": seed}, provenance=provenance(data=content))
    job = '{"job": 9, "overrides": ["alpha=5", "seed=1"], "status": "refused", "message": "alpha=5 is out of range."}\n'
    (tmp_path / "jobs.jsonl").write_text(job)
    assert [len(one.field.runs) for one in compare(load_runs(tmp_path)).fields] == [3, 3]
    write_run(tmp_path / "unknown", {"seed": 1})
    assert [len(one.field.runs) for one in compare(load_runs(tmp_path)).fields] == [3, 3, 1]


def test_a_path_that_is_compared_along_brings_its_own_content(tmp_path: Path) -> None:
    for seed in SEEDS:
        for name in ("one", "two"):
            told = {"data.path": f"{name}.jsonl", "seed": seed}
            write_run(tmp_path / f"{name}-{seed}", told, provenance=provenance(data=name))
    (result,) = compare(load_runs(tmp_path), by=["data.path"]).fields
    assert values(result) == [{"data.path": "one.jsonl"}, {"data.path": "two.jsonl"}]
    write_run(tmp_path / "changed", {"data.path": "two.jsonl", "seed": 4}, provenance=provenance(data="2"))
    assert [len(one.field.runs) for one in compare(load_runs(tmp_path), by=["data.path"]).fields] == [3, 3, 1]


def test_every_digit_of_a_seed_counts(tmp_path: Path) -> None:
    for seed in (20251121, 20251122, 20251123):
        write_run(tmp_path / str(seed), {"seed": seed})
    comparison = compare(load_runs(tmp_path))
    assert comparison.fields[0].rows[0].setting.seeds == ["20251121", "20251122", "20251123"]
    assert not comparison.sorted.left_out


@pytest.mark.parametrize(
    ("value", "text"),
    [(20251121, "20251121"), (20251121.0, "20251121"), (0.1 + 0.2, "0.3"), (1e-7, "1e-07"), (1.0, "1"), (1e18, "1e+18"),
     (2**62 + 1, "4611686018427387905"), (float("inf"), "inf"), (True, "true"), (float("nan"), "–"), (None, "null")],
)  # fmt: skip
def test_values_are_short_and_keep_what_tells_them_apart(value: object, text: str) -> None:
    assert shown(value) == text


def test_by_averages_over_the_other_keys_and_pairs_by_seed(tmp_path: Path) -> None:
    for seed in SEEDS:
        for alpha in (0, 1):
            for beta in (0.0, 0.1):
                accuracy = 0.5 + 0.1 * alpha + 0.2 * (beta == 0.1) + 0.01 * seed * alpha
                overrides = {"alpha": alpha, "beta": beta, "seed": seed}
                write_run(tmp_path / f"{alpha}-{beta}-{seed}", overrides, accuracy=accuracy, minute=alpha)
    (result,) = compare(load_runs(tmp_path), by=["alpha"], baseline={"alpha": 0}).fields
    assert (result.field.knobs, result.field.over) == (["alpha"], ["beta"])
    claim = result.claims[0]
    # three seeds, not six runs: runs of one seed are no independent witnesses
    assert claim.difference.values == pytest.approx((0.11, 0.12, 0.13))
    assert claim.improvement == pytest.approx(1.0)  # within each beta
    with pytest.raises(UserError, match="by=gamma: the runs do not differ in it"):
        compare(load_runs(tmp_path), by=["gamma"])


def test_each_keys_effect_is_taken_over_the_same_settings(tmp_path: Path) -> None:
    for seed in SEEDS:
        for alpha, beta in ((0, 0.0), (0, 0.1), (1, 0.0), (1, 0.1), (0, 0.2)):  # alpha=1 beta=0.2 is not there
            accuracy = 0.3 + 0.1 * alpha + beta + 0.001 * seed
            overrides = {"alpha": alpha, "beta": beta, "seed": seed}
            write_run(tmp_path / f"{alpha}-{beta}-{seed}", overrides, accuracy=accuracy, retention=None)
    (result,) = compare(load_runs(tmp_path)).fields
    effects = {effect.key: effect for effect in result.effects}
    assert effects["alpha"].cells == 2
    assert effects["beta"].cells == 1
    gaps = {(claim.first, claim.second): claim.difference.mean for claim in result.keys}
    assert gaps["alpha=1", "alpha=0"] == pytest.approx(0.1)
    assert gaps["beta=0.2", "beta=0"] == pytest.approx(0.2)


def test_failed_stopped_and_torn_runs_are_listed_with_their_reason(tmp_path: Path) -> None:
    write_sweep(tmp_path, [{"alpha": 0}, {"alpha": 1}], SEEDS)
    alarm = {"monitor": "entropy", "step": 6, "message": "entropy: too low.", "action": "stop"}
    write_run(tmp_path / "stopped", {"alpha": 2, "seed": 1}, status="stopped", alarms=[alarm])
    write_run(tmp_path / "failed", {"alpha": 2, "seed": 2}, status="failed", error="RuntimeError: the reward broke")
    write_run(tmp_path / "killed", {"alpha": 2, "seed": 3}, status="running")
    write_run(tmp_path / "torn", {"alpha": 2, "seed": 4})
    (tmp_path / "torn" / "summary.json").write_text('{"run_id": ')
    with (tmp_path / "run-0-1" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "rew')
    job = '{"job": 9, "overrides": ["alpha=5", "seed=1"], "status": "refused", "message": "alpha=5 is out of range."}\n'
    (tmp_path / "jobs.jsonl").write_text(job)
    comparison = compare(load_runs(tmp_path))
    why = {Path(one["run"]).name: one["why"] for one in comparison.sorted.left_out}
    assert why["stopped"] == "stopped: at step 6 of 12: entropy: too low."
    assert why["failed"] == "failed: at step 6 of 12: RuntimeError: the reward broke"
    assert why["killed"] == "running: at step 6 of 12, or killed there"
    assert why["torn"].startswith("unreadable: summary.json cannot be read: unexpected end of data")
    assert why[f"{tmp_path.name}#9"] == "refused: alpha=5 is out of range."
    assert [row.setting.label for row in comparison.fields[0].rows] == ["alpha=1", "alpha=0"]
    assert comparison.found.curves["step"].max() == 12


def test_a_pair_without_a_partner_is_left_out_and_the_reason_said(tmp_path: Path) -> None:
    write_sweep(tmp_path, [{"alpha": 0}, {"alpha": 1}], SEEDS)
    summary = tmp_path / "run-1-3" / "summary.json"
    summary.write_text(summary.read_text().replace('"finished"', '"interrupted"'))
    (result,) = compare(load_runs(tmp_path)).fields
    assert len(result.claims[0].difference.values) == 2
    assert result.claims[0].left_out == 1
    (missing,) = result.field.missing
    assert (missing["setting"], missing["unit"]) == ("alpha=1", ((), "3"))
    assert missing["why"] == "run-1-3 interrupted: at step 12 of 12"


def test_of_a_repeated_run_the_newest_counts(tmp_path: Path) -> None:
    write_run(tmp_path / "old", {"alpha": 0, "seed": 1}, accuracy=0.1, minute=0)
    write_run(tmp_path / "new", {"alpha": 0, "seed": 1}, accuracy=0.9, minute=5)
    comparison = compare(load_runs(tmp_path))
    assert comparison.fields[0].rows[0].levels["eval/accuracy"].mean == 0.9
    assert comparison.sorted.left_out[0]["why"] == "was repeated with the same setting and seed: new"


def test_a_baseline_is_found_by_some_of_its_keys_and_must_be_one(tmp_path: Path) -> None:
    write_sweep(tmp_path, [{"alpha": 0, "beta": 0.0}, {"alpha": 1, "beta": 0.0}, {"alpha": 1, "beta": 0.1}], SEEDS)
    found = load_runs(tmp_path)
    for given in ("alpha=1 beta=0.1", {"beta": 0.1}, {"beta": "0.10"}):
        assert compare(found, baseline=given).fields[0].baseline.label == "alpha=1 beta=0.1"
    with pytest.raises(UserError, match="fits several settings"):
        compare(found, baseline="alpha=1")
    with pytest.raises(UserError, match=r"baseline='alpha=7' is no setting. There are: alpha=0 beta=0; "):
        compare(found, baseline="alpha=7")


def test_items_are_compared_where_both_runs_answered_them(tmp_path: Path) -> None:
    right = [True] * 15 + [False] * 5
    for seed in SEEDS:
        write_run(tmp_path / f"a-{seed}", {"alpha": 0, "seed": seed}, verdicts=[False] * 10 + right[10:])
        write_run(
            tmp_path / f"b-{seed}", {"alpha": 1, "seed": seed}, verdicts=right if seed < 3 else right[1:], minute=1
        )
    found = load_runs(tmp_path)
    (result,) = compare(found).fields
    tests = result.claims[0].items
    assert tests.keys() == {"seed=1", "seed=2"}  # the third pair answered other items
    assert (tests["seed=1"].only_first, tests["seed=1"].only_second) == (10, 0)
    assert len(found.items) == 119
    assert list(found.items.columns[:3]) == ["run", "step", "suite"]


def test_the_items_are_those_of_the_model_that_was_kept(tmp_path: Path) -> None:
    """With keep_best the accuracy beside them is that of the best step, not of the last one."""
    run = write_run(tmp_path / "run", {"seed": 1}, accuracy=0.75, verdicts=[True] + [False] * 3)
    better = [{"step": 6, "suite": None, "row": row, "prompt": f"p{row}", "verdict": row != 0} for row in range(4)]
    with (run / "evaluation.jsonl").open("a") as file:
        file.write("".join(json.dumps(item) + "\n" for item in better))
    summary = json.loads((run / "summary.json").read_text())

    def listed() -> dict[str, float]:
        row = runs_table(compare(load_runs(tmp_path))).iloc[0]
        return {name: row[name] for name in ("items", "wilson_low", "wilson_high") if name in row}

    of_the_last = wilson(1, 4)
    assert listed() == {"items": 4, "wilson_low": of_the_last.low, "wilson_high": of_the_last.high}
    of_the_best = wilson(3, 4)
    kept = {"items": 4, "wilson_low": of_the_best.low, "wilson_high": of_the_best.high}
    for step, expected in ((6, kept), (7, {})):  # a metric of the training may be best where nothing was evaluated
        best = {"metric": "eval/accuracy", "step": step, "value": 0.75}
        (run / "summary.json").write_text(json.dumps({**summary, "best": best}))
        assert listed() == expected


def test_rows_of_other_data_are_other_items(tmp_path: Path) -> None:
    for seed in SEEDS:
        for name in ("near", "far"):
            told = {"data.path": name, "seed": seed}
            run = write_run(tmp_path / f"{name}-{seed}", told, verdicts=[name == "near"] * 20)
            items = (run / "evaluation.jsonl").read_text().replace('"prompt": "p', f'"prompt": "{name} ')
            (run / "evaluation.jsonl").write_text(items)
    (result,) = compare(load_runs(tmp_path), by=["data.path"]).fields
    assert result.claims and not any(claim.items for claim in result.claims)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("provenance.json", '{"data": ', "provenance.json cannot be read: unexpected end of data"),
        ("provenance.json", "[1]", "provenance.json cannot be read: it holds no mapping"),
        (".hydra/overrides.yaml", "- [", "overrides.yaml cannot be read: while parsing a flow node"),
        (".hydra/overrides.yaml", "alpha: 1", "overrides.yaml cannot be read: it holds no list"),
        ("config.yaml", "\x00", "config.yaml cannot be read: unacceptable character"),
        ("summary.json", None, "summary.json cannot be read: No such file or directory"),
    ],
)
def test_a_damaged_file_is_named_and_ends_nothing(tmp_path: Path, name: str, content: str | None, why: str) -> None:
    write_sweep(tmp_path, [{"alpha": 0}, {"alpha": 1}], SEEDS)
    file = tmp_path / "run-0-2" / name
    file.unlink(missing_ok=True) if content is None else file.write_text(content)
    comparison = compare(load_runs(tmp_path))
    (left,) = comparison.sorted.left_out
    assert Path(left["run"]).name == "run-0-2" and left["why"].startswith(f"unreadable: {why}")
    assert len(comparison.fields[0].field.runs) == 5


def test_without_an_evaluation_the_last_rewards_are_compared(tmp_path: Path) -> None:
    for alpha in (0, 1):
        for seed in SEEDS:
            folder = write_run(
                tmp_path / f"{alpha}-{seed}", {"alpha": alpha, "seed": seed}, accuracy=None, retention=None
            )
            lines = [f'{{"step": {step}, "reward": {alpha + step / 100 + seed / 10}}}\n' for step in range(1, 21)]
            (folder / "metrics.jsonl").write_text("".join(lines))
    comparison = compare(load_runs(tmp_path))
    assert comparison.metric == "reward" and comparison.notes
    best = comparison.fields[0].rows[0].levels["reward"]
    assert best.by_seed["1"] == pytest.approx(1 + 0.195 + 0.1)  # steps 19 and 20
    with pytest.raises(UserError, match="metric=rewrad: no run has it"):
        compare(load_runs(tmp_path), metric="rewrad")


def test_paths_are_runs_sweeps_and_globs(tmp_path: Path) -> None:
    write_sweep(tmp_path / "sweep", [{"alpha": 0}], SEEDS)
    assert len(load_runs(tmp_path / "sweep" / "run-0-1").runs) == 1
    assert len(load_runs(tmp_path / "sweep", tmp_path / "sweep" / "run-0-1").runs) == 3
    assert len(load_runs(f"{tmp_path}/sweep/run-0-[12]").runs) == 2
    with pytest.raises(UserError, match="there is no such folder"):
        load_runs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no run's folder in"):
        load_runs(tmp_path / "empty")


def test_the_seed_of_a_part_that_others_lack_makes_no_setting(tmp_path: Path) -> None:
    base = {**SMALL, "teacher.context.seed": None}
    for seed in (1, 2):
        write_run(tmp_path / f"a{seed}", {"experiment": "sdpo", "seed": seed, "teacher.context.seed": seed}, base=base)
        write_run(tmp_path / f"b{seed}", {"experiment": "sft", "seed": seed}, base=base)
    (field,) = sort_runs(load_runs(tmp_path), "eval/accuracy").fields
    assert [(one.values, one.seeds) for one in field.settings] == [
        ({"experiment": "sdpo"}, ["1", "2"]),
        ({"experiment": "sft"}, ["1", "2"]),
    ]
