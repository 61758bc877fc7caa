"""Every format ends in the same rows."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.helpers import everything, jsonl, load, rows, tokenizer

EXPECTED = [
    {
        "prompt": [{"role": "user", "content": f"question {i}"}],
        "answer": f"answer {i}",
        "golden_response": [],
        "id": f"q{i}",
        "topic": "t",
    }
    for i in range(20)
]


def numbered():
    return [{**row, "id": f"q{i}", "topic": "t"} for i, row in enumerate(rows())]


def write(folder, kind):
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        return jsonl(folder, numbered())
    if kind == "json":
        path.write_text(json.dumps(numbered(), indent=2))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(numbered()), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "prompt", "answer", "topic"])
            writer.writeheader()
            writer.writerows(numbered())
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv"])
def test_formats_agree(tmp_path, kind):
    splits = load(write(tmp_path, kind))
    assert everything(splits) == EXPECTED
    assert len(splits.eval) == 2 and splits.bad_rows == []


def test_format_wins_over_the_extension(tmp_path):
    path = write(tmp_path, "jsonl").rename(tmp_path / "data.txt")
    assert len(everything(load(path, format="jsonl"))) == 20


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_byte_order_mark_and_windows_line_ends(tmp_path, kind):
    path = write(tmp_path, kind)
    text = path.read_bytes().replace(b"\r\n", b"\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    assert everything(load(path)) == EXPECTED


def test_csv_cells_may_span_lines_and_an_empty_cell_is_no_answer(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('prompt,answer\n"two\nlines, one cell",x\nsecond,\nthird,z\n')
    first, second, third = everything(load(path))
    assert first["prompt"][0]["content"] == "two\nlines, one cell"
    # The ids are the lines on which the rows begin.
    assert (first["id"], second["id"], third["id"]) == ("2", "4", "5")
    assert second["answer"] is None and third["answer"] == "z"


def test_blank_lines_are_passed_over(tmp_path):
    assert [row["id"] for row in everything(load(jsonl(tmp_path, [rows()[0], "", rows()[1], "  "])))] == ["1", "3"]


def test_text_is_what_the_user_says(tmp_path):
    texts = [{"text": f"text number {i}"} for i in range(4)]
    row = everything(load(jsonl(tmp_path, texts)))[0]
    assert row == {
        "prompt": [{"role": "user", "content": "text number 0"}],
        "answer": None,
        "golden_response": [],
        "id": "1",
    }
    assert everything(load(jsonl(tmp_path, texts), chat_template="none"))[0]["prompt"] == "text number 0"


def test_prompt_tokens_cut_raw_text_without_loss(tmp_path):
    texts = [f"{i} is where this longer text begins, and on it goes" for i in range(5)] + ["short"]
    path = jsonl(tmp_path, [{"text": text, "system": "kept"} for text in texts])
    found = everything(load(path, prompt_tokens=12))
    assert [row["prompt"] + row["continuation"] for row in found] == texts
    lengths = [len(tokenizer()(row["prompt"])["input_ids"]) for row in found]
    assert lengths == [12] * 5 + [5] and found[5]["continuation"] == ""
    assert found[0]["system"] == "kept"


def test_golden_responses_may_be_one_text_or_several(tmp_path):
    values = [{"prompt": "a", "golden_response": "x"}, {"prompt": "b", "golden_response": ["x", "y"]}]
    values.append({"prompt": "c", "golden_response": None})
    found = everything(load(jsonl(tmp_path, values)))
    assert [row["golden_response"] for row in found] == [["x"], ["x", "y"], []]


def test_numbers_become_answers_and_ids(tmp_path):
    path = jsonl(tmp_path, [{"prompt": f"p{i}", "answer": i + 0.5, "id": i} for i in range(3)])
    assert [(row["answer"], row["id"]) for row in everything(load(path))] == [("0.5", "0"), ("1.5", "1"), ("2.5", "2")]


def test_conversation_ends_with_the_last_user_turn(tmp_path):
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content, "weight": 1} for role, content in turns]
    values = [{"messages": messages}, {"messages": messages[1:4]}, {"prompt": messages[:2]}]
    full, open_ended, short = everything(load(jsonl(tmp_path, values)))
    assert full["prompt"] == [{"role": role, "content": content} for role, content in turns[:4]]
    assert full["golden_response"] == ["d"]
    assert [m["content"] for m in open_ended["prompt"]] == ["a", "b", "c"] and open_ended["golden_response"] == []
    assert [m["content"] for m in short["prompt"]] == ["s", "a"]
    assert "messages" not in full


def test_a_golden_response_of_its_own_wins_over_the_conversations(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "from the conversation"}]
    values = [{"messages": messages, "golden_response": ["own"]}, {"messages": messages, "golden_response": None}]
    own, inner, _ = everything(load(jsonl(tmp_path, [*values, {"prompt": "p", "golden_response": None}])))
    assert own["golden_response"] == ["own"] and inner["golden_response"] == ["from the conversation"]


def test_system_messages(tmp_path):
    values = [{"prompt": "a", "system": "own"}, {"prompt": "b", "system": None}, {"prompt": "c", "system": ""}]
    values.append({"prompt": [{"role": "system", "content": "inner"}, {"role": "user", "content": "d"}]})
    path = jsonl(tmp_path, values)

    def systems(**settings):
        return [
            [m["content"] for m in row["prompt"] if m["role"] == "system"] for row in everything(load(path, **settings))
        ]

    assert systems() == [["own"], [], [], ["inner"]]
    assert systems(system="all") == [["all"]] * 4
    assert systems(system_field=None) == [[], [], [], ["inner"]]
    plain = jsonl(tmp_path, values[:3], "plain.jsonl")
    assert [row["prompt"] for row in everything(load(plain, chat_template="none"))] == ["own\n\na", "b", "c"]


def test_field_names(tmp_path):
    values = [
        {"q": {"text": f"p{i}"}, "label": "L", "demo": ["D"], "key": f"k{i}", "a.b": "kept", "n": {"deep": [i]}}
        for i in range(3)
    ]
    names = {"prompt_field": "q.text", "answer_field": "label", "demonstration_field": "demo", "id_field": "key"}
    found = everything(load(jsonl(tmp_path, values), **names))
    assert found[1] == {
        "prompt": [{"role": "user", "content": "p1"}],
        "answer": "L",
        "golden_response": ["D"],
        "id": "k1",
        "q": {"text": "p1"},
        "a.b": "kept",
        "n": {"deep": [1]},
    }


def test_other_columns_stay_as_they_are(tmp_path):
    values = [{"prompt": f"p{i}", "text": "unused", "suite": "s", "n": i, "tags": ["a"], "maybe": 1} for i in range(3)]
    del values[1]["maybe"]
    found = everything(load(jsonl(tmp_path, values)))
    assert [row["n"] for row in found] == [0, 1, 2] and found[0]["tags"] == ["a"] and found[0]["text"] == "unused"
    assert [row["maybe"] for row in found] == [1, None, 1]


@pytest.mark.parametrize("train", ["train.json", "train.jsonl", "train.txt"])
@pytest.mark.parametrize("evaluation", ["lines.json", "list.json", "list.jsonl", "table.csv", "table.parquet", "data"])
def test_each_file_is_read_by_what_it_holds(tmp_path, train, evaluation):
    """One format is given for both files, and neither has to have it."""
    lines = "".join(json.dumps({"prompt": f"q{i}", "answer": f"a{i}"}) + "\n" for i in range(3))
    (tmp_path / train).write_text(lines.replace("q", "t"))
    held = [{"prompt": f"q{i}", "answer": f"a{i}"} for i in range(3)]
    path = tmp_path / evaluation
    if path.suffix == ".csv":
        path.write_text("prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in held))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(held), path)
    else:
        path.write_text(lines if path.stem in ("lines", "data") else json.dumps(held, indent=1))
    splits = load(tmp_path / train, eval_path=str(path), format="jsonl")
    assert splits.eval["answer"][:] == ["a0", "a1", "a2"]
    assert len(splits.train) == 3


def test_an_object_alone_in_its_file(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('\n{"prompt": "q"}\n')
    assert len(load(tmp_path / "one.jsonl", eval_path=str(path)).train) == 1
