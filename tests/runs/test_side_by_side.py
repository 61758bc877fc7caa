"""The two prompts in two columns: what both have stands in both, and what differs is marked."""

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from selfdistill.runs.side_by_side import COLUMN_CELLS, Stretch, columns, stretches
from selfdistill.tokens import encode_prompt
from tests.tiny import tiny_tokenizer


def table(left, right):
    tokenizer = tiny_tokenizer()
    return columns(stretches(tokenizer, left, right), "student", "teacher")


def asked(text):
    return encode_prompt(tiny_tokenizer(), [{"role": "user", "content": text}])


def test_equal_prompts_have_no_mark():
    assert "⟦" not in table(asked("add 1 2"), asked("add 1 2"))


def test_what_the_teacher_sees_beyond_is_marked_on_its_side_alone():
    page = table(asked("add 1 2"), asked("add 1 2: it is 3"))
    assert page.count("⟦") == 1
    assert "│ <|user|>add 1 2⟦: it is 3⟧<|end|><|assistant|>" in page
    assert "<|user|>add 1 2<|end|><|assistant|>  " in page


@given(st.text("ab1 ", max_size=150), st.text("ab1 ", max_size=150))
def test_each_side_reads_as_its_prompt(left, right):
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in (left, right)]
    parts = stretches(tokenizer, *ids)
    assert "".join(part.left for part in parts) == left
    assert "".join(part.right for part in parts) == right
    for line in columns(parts, "student", "teacher").splitlines():
        assert "│" in line
        assert cell_len(line.split(" │")[0]) == COLUMN_CELLS


def test_long_prompts_that_share_nothing_are_one_difference():
    (part,) = stretches(tiny_tokenizer(), [20] * 3000, [21] * 3000)
    assert not part.same


def test_control_characters_and_line_breaks():
    page = table([], []) + columns([], "a", "b")
    assert "student" in page
    lines = columns([Stretch(True, "a\nb", "a\nb"), Stretch(False, "", "x\x1b[2J\ny")], "s", "t").splitlines()[2:]
    assert [line.split("│")[0].strip() for line in lines] == ["a", "b", ""]
    assert [line.split("│")[1].strip() for line in lines] == ["a", "b⟦x␛[2J⏎⟧", "⟦y⟧"]
