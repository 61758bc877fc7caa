import io

import pytest

from selfdistill.runs.screen import Screen
from selfdistill.runs.step_table import COLUMNS, StepTable, fitting
from selfdistill.text import clock, short
from tests.runs.test_callbacks import Loop

FULL = {
    "reward": 0.41, "monitor/reward_spread": 0.31, "frac_reward_zero_std": 0.25, "completions/mean_length": 23.4,
    "entropy": 0.52, "kl": 0.0123, "distill/divergence": 0.25, "cross_entropy": 1.5, "step_time": 0.5,
}  # fmt: skip


def table_of(tmp_path, max_steps, screen, tokens=None, rows=38):
    counted = tokens or [0]
    loop = Loop(tmp_path, [StepTable(screen, lambda: counted[0], rows)], max_steps=max_steps)
    loop.begin()
    return loop


def lines(screen):
    return [line for line in screen.file.getvalue().splitlines() if line.strip()][2:]


def test_a_row_shows_what_the_run_has(tmp_path):
    screen, tokens = Screen(file=io.StringIO(), width=120), [0]
    loop = table_of(tmp_path, 3, screen, tokens)
    for count in (100, 300, 600):
        tokens[0] = count
        loop.step(**FULL)
    header, *rows = lines(screen)
    names = "step reward dead cross-ent. diverg. KL length entropy tok/s memory left".split()
    assert header.split() == names
    assert len(rows) == 3
    assert "1/3" in rows[0] and "0.410 ±0.310   25%       1.500    0.250   0.012    23.4    0.520     200" in rows[0]
    assert rows[1].split()[9] == "400"
    assert "\x1b" not in screen.file.getvalue()


def test_columns_are_those_of_the_run(tmp_path):
    screen = Screen(file=io.StringIO(), width=120)
    loop = table_of(tmp_path, 4, screen)
    loop.step(reward=1.0)
    loop.step(reward=1.0, distill__divergence=0.5)  # no row had a teacher's signal in the first step
    loop.step(reward=1.0)
    headers = [line for line in lines(screen) if "reward" in line]
    assert ["diverg." in header for header in headers] == [False, True]
    assert lines(screen)[-1].split()[1:3] == ["1.000", "-"]


@pytest.mark.parametrize(("max_steps", "rows"), [(10, 38), (1000, 38), (39, 5), (7, 1)])
def test_rows_are_few_and_the_first_and_the_last_are_among_them(tmp_path, max_steps, rows):
    screen = Screen(file=io.StringIO(), width=80)
    loop = table_of(tmp_path, max_steps, screen, rows=rows)
    for _ in range(max_steps):
        loop.step(reward=1.0)
    loop.call("on_train_end")
    steps = [int(line.split("/")[0]) for line in lines(screen)[1:]]
    assert steps[0] == 1
    assert steps[-1] == max_steps
    assert len(set(steps)) == len(steps) <= rows + 2
    assert len(steps) >= min(max_steps, rows)


def test_a_training_that_is_stopped_shows_its_last_step(tmp_path):
    screen = Screen(file=io.StringIO(), width=80)
    loop = table_of(tmp_path, 1000, screen)
    for _ in range(5):
        loop.step(reward=1.0)
    loop.call("on_train_end")
    assert [line.split()[0] for line in lines(screen)[1:]] == ["1/1000", "5/1000"]


def test_lines_between_rows_leave_the_table_whole_and_blocks_repeat_the_header(tmp_path):
    screen = Screen(file=io.StringIO(), width=80)
    loop = table_of(tmp_path, 3, screen)
    loop.step(reward=1.0)
    screen.print_line("evaluation at step 1: accuracy 0.5")
    loop.step(reward=1.0)
    screen.print("a table of completions")
    loop.step(reward=1.0)
    kinds = [line.split()[0] for line in lines(screen)]
    assert kinds == ["step", "1/3", "evaluation", "2/3", "a", "step", "3/3"]


@pytest.mark.parametrize("width", [40, 80, 100, 140])
def test_a_narrow_terminal_has_fewer_columns(width):
    shown = fitting(list(COLUMNS), width)
    assert sum(column.width + 2 for column in shown) - 2 <= max(width, 62)
    titles = [column.title for column in shown]
    assert titles[:2] == ["step", "reward"] and titles[-1] == "left"
    assert (len(shown) == len(COLUMNS)) == (width >= 100)


def test_on_a_terminal_rows_stay_and_a_bar_goes(tmp_path):
    screen = Screen(file=io.StringIO(), width=100, force_terminal=True)
    loop = table_of(tmp_path, 2, screen)
    loop.step(reward=0.25)
    loop.callbacks[0]._bar.refresh()
    loop.step(reward=0.5)
    loop.call("on_train_end")
    text = screen.file.getvalue()
    assert text.count("reward ±spread") == text.count("left") == 1  # the bar moves below one table
    assert "1/2" in text and "0.250" in text and "0.500" in text
    assert loop.callbacks[0]._bar is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.000"), (0.41234, "0.412"), (12.34, "12.3"), (1234.5, "1234"), (4e-5, "4e-05"), (-0.5, "-0.500"),
     (float("nan"), None), (None, None), (2.5e6, "2e+06")],
)  # fmt: skip
def test_short(value, text):
    assert short(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(8, "8s"), (245, "4m05s"), (7380, "2h03m"), (273_600, "3d04h")])
def test_clock(seconds, text):
    assert clock(seconds) == text
