import io
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from selfdistill.config.batch import Batch
from selfdistill.runs.console import (
    Plan,
    change_table,
    config_tree,
    count,
    make_console,
    plan_table,
    print_all,
    samples_table,
    size,
    where_table,
)

PLAN = Plan(
    model="tiny", device="cpu", parameters=860_000, trained=43_000, train_rows=400, eval_rows=100, max_steps=300,
    batch=Batch(8, 4, 2), num_generations=4, adapter="LoRA, rank 32",
    weights="bfloat16, trained in float32",
    memory_gib={"weights": 0.25, "optimizer": 1.0},
)  # fmt: skip


def shown(renderable, **options) -> str:
    file = io.StringIO()
    make_console(file=file, **{"width": 80, **options}).print(renderable)
    text = file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "\x1b" not in text
    return text


def test_the_tree_shows_every_key_and_no_secret():
    config = OmegaConf.create(
        {"seed": 0, "model": {"name": "[red]tiny", "lora": {"rank": 32}}, "api_key": "sk-something", "teacher": None,
         "on": True, "system": "two\nlines", "path": "x" * 200, "empty": {}, "copy": "${seed}"}
    )  # fmt: skip
    text = shown(config_tree(config))
    for part in (
        "seed: 0",
        "name: [red]tiny",
        "rank: 32",
        "api_key: ***",
        "teacher: null",
        "on: true",
        r"'two\nlines'",
    ):
        assert part in text
    assert "empty: {}" in text
    assert "copy: 0" in text
    assert text.count("x") >= 200


def test_the_plan_s_arithmetic():
    text = shown(plan_table(PLAN))
    assert "860 K, 43 K trained (5.0%; LoRA, rank 32)" in text
    assert "bfloat16, trained in float32" in text
    assert "8 completions x 4 accumulated x 2 processes = 64: 16 prompts x 4" in text
    assert "300 steps = 19,200 completions = 12.00 passes over the data" in text
    assert "about 1.2 GiB and activations (weights 256 MiB, optimizer 1.0 GiB)" in text
    assert PLAN.batch.completions == 64


def test_changes_are_signed_and_coloured_by_what_is_better():
    before = {"accuracy": 0.12, "forgetting": 0.0, "retention/sort": 1.0, "old": 0.5, "same": 0.3}
    after = {"accuracy": 0.58, "forgetting": 0.03, "retention/sort": 0.94, "new": 1.0, "same": 0.3}
    text = shown(change_table(before, after))
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if len(line.split()) == 4}
    assert rows["accuracy"] == ["0.120", "0.580", "+0.460"]
    assert rows["forgetting"] == ["0.000", "0.030", "+0.030"]
    assert rows["old"] == ["0.500", "-", "-"]
    assert rows["new"] == ["-", "1.000", "-"]
    styles = {str(cell): cell.style for cell in change_table(before, after).columns[3].cells}
    assert styles == {"+0.460": "green", "+0.030": "red", "-0.060": "red", "-": "", "+0.000": ""}


def test_samples_show_text_as_it_is():
    rows = [
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "[bold]hi[/bold] :smile:"}],
         "completion": [{"role": "assistant", "content": "answer"}], "reward": 1.0, "advantage": 0.7071,
         "feedback": "wrong"},
        {"prompt": "B" + "p" * 500 + "E", "completion": "B" + "c" * 500 + "E", "reward": None,
         "advantage": float("nan")},
    ]  # fmt: skip
    text = shown(samples_table(7, rows))
    assert "completions at step 7" in text
    squeezed = "".join(text.split())
    assert "[bold]hi[/bold]" in squeezed
    assert ":smile:" in squeezed
    assert "wrong" in text
    assert "0.707" in text
    assert "feedback" not in shown(samples_table(7, [{"prompt": "p", "completion": "c", "reward": 0.0}]))
    prompt, completion = (list(samples_table(7, rows).columns[column].cells)[1].plain for column in (0, 1))
    assert len(prompt) == 160
    assert prompt.startswith("...p")
    assert prompt.endswith("pE")
    assert len(completion) <= 160
    assert completion.startswith("Bc")
    assert completion.endswith("cE")


def test_where_everything_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = shown(
        where_table({"run": tmp_path / "outputs" / "r", "W&B": None, "export": Path("/elsewhere/x"), "see": "a b"})
    )
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["run", "outputs/r"],
        ["export", "/elsewhere/x"],
        ["see", "a", "b"],
    ]


def test_an_old_terminal_gets_ascii():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=file, width=80)
    print_all(console, config_tree(OmegaConf.create({"a": {"b": 1}})), change_table({"x": 1.0}, {"x": 2.0}))
    file.flush()
    assert b"+1.000" in file.buffer.getvalue()


@pytest.mark.parametrize(
    ("number", "text"), [(812, "812"), (860_000, "860 K"), (1_240_000_000, "1.24 B"), (7e12, "7 T")]
)
def test_count(number, text):
    assert count(int(number)) == text


@pytest.mark.parametrize(("gib", "text"), [(0.0005, "0.5 MiB"), (0.25, "256 MiB"), (17.34, "17.3 GiB")])
def test_size(gib, text):
    assert size(gib) == text
