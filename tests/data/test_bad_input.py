"""Every wrong file or argument is refused with one message: the place, what is wrong, what to write instead."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfdistill.errors import UserError
from tests.data.helpers import everything, jsonl, load, rows

GOOD = json.dumps({"prompt": "p", "answer": "a"})


def refused(path, **settings):
    """The message, which is one line."""
    with pytest.raises(UserError) as error:
        load(path, **settings)
    message = str(error.value)
    assert "\n" not in message and "?." not in message and ".." not in message
    return message


BAD_ROWS = {
    "malformed": ('{"prompt": "p",', "malformed JSON at column"),
    "no object": ('["p"]', "a row must be an object"),
    "over many lines": ("{", "must stand on one line"),
    "no field": ('{"promt": "p", "answer": "a"}', "did you mean promt? Rename it, or write data.prompt_field=promt"),
    "unlike field": ('{"xyz": "p"}', "the row has xyz. Say which one it is with data.prompt_field=NAME"),
    "no fields": ("{}", "the row has no fields"),
    "empty prompt": ('{"prompt": "  ", "answer": "a"}', "field 'prompt' is empty"),
    "null prompt": ('{"prompt": null, "answer": "a"}', "field 'prompt' is empty"),
    "prompt is a number": ('{"prompt": 3, "answer": "a"}', "field 'prompt' must be text, this is a number: 3"),
    "text is a list": ('{"text": ["p"], "answer": "a"}', "field 'text' must be text, this is a list"),
    "empty answer": ('{"prompt": "p", "answer": ""}', "field 'answer' is empty"),
    "answer is an object": ('{"prompt": "p", "answer": {"x": 1}}', "field 'answer' must be text, this is an object"),
    "answer is a bool": ('{"prompt": "p", "answer": true}', "this is true or false: True"),
    "demonstration": ('{"prompt": "p", "answer": "a", "golden_response": [1]}', "[\"…\"], this has a number: 1"),
    "demonstration object": ('{"prompt": "p", "answer": "a", "golden_response": {"x": 1}}', "this has an object"),
    "no demonstration": ('{"prompt": "p", "answer": "a", "golden_response": []}', "field 'golden_response' is empty"),
    "system": ('{"prompt": "p", "answer": "a", "system": 1}', "field 'system' must be text or null"),
    "half a character": ('{"prompt": "\\ud83d", "answer": "a"}', "half a character, \\ud83d"),
    "messages are text": ('{"messages": "p", "answer": "a"}', "must be a list of messages"),
    "no messages": ('{"messages": [], "answer": "a"}', "no message with the role 'user'"),
    "message keys": ('{"messages": [{"from": "human", "value": "p"}], "answer": "a"}', "message 1 must be {\"role\""),
    "role": ('{"messages": [{"role": "human", "content": "p"}], "answer": "a"}', "the role 'human' is not one of"),
    "no content": ('{"messages": [{"role": "user", "content": null}], "answer": "a"}', "the content must be text"),
    "empty id": ('{"prompt": "p", "answer": "a", "id": ""}', "field 'id' is empty"),
    "id is a list": ('{"prompt": "p", "answer": "a", "id": [1]}', "field 'id' must be text or a whole number"),
    "too long": (json.dumps({"prompt": "p" * 98, "answer": "a"}), "101 tokens, more than data.max_prompt_tokens=100"),
    "answer missing": ('{"prompt": "p", "anwser": "a"}', "no field 'answer', and other rows have it"),
    "nested deeply": ("[" * 100000, "malformed JSON"),
}  # fmt: skip


@pytest.mark.parametrize("line, words", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row(tmp_path, line, words):
    path = jsonl(tmp_path, [GOOD, line, GOOD.replace('"p"', '"another"')])
    message = refused(path, max_prompt_tokens=100)
    assert message.startswith(f"{path}, line 2: ") and words in message and "data.on_bad_row=skip" in message
    splits = load(path, max_prompt_tokens=100, on_bad_row="skip")
    assert [bad["line"] for bad in splits.bad_rows] == [2] and words in splits.bad_rows[0]["reason"]
    assert splits.bad_rows[0]["file"] == str(path)
    assert [row["id"] for row in everything(splits)] == ["1", "3"]


def test_wrong_encoding_in_jsonl(tmp_path):
    path = tmp_path / "data.jsonl"
    first = '{"prompt": "a"}\n'
    path.write_bytes(first.encode() + '{"prompt": "é"}\n{"prompt": "c"}\n'.encode("latin1"))
    message = refused(path)
    assert f"line 2: is not UTF-8: byte 0xe9 at byte offset {len(first) + 12} of the file" in message
    assert [bad["line"] for bad in load(path, on_bad_row="skip").bad_rows] == [2]


def test_wrong_encoding_elsewhere(tmp_path):
    listed = tmp_path / "data.json"
    listed.write_bytes(b'[{"prompt": "a"},\n{"prompt": "\xe9"}]')
    assert "data.json, line 2: is not UTF-8: byte 0xe9 at byte offset 30" in refused(listed)
    table = tmp_path / "data.csv"
    table.write_bytes(b"prompt\na\n\xe9\nb\n")
    assert "data.csv, line 3: is not UTF-8: it has the byte 0xe9" in refused(table)
    assert len(everything(load(table, on_bad_row="skip"))) == 2


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_utf16(tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    path.write_bytes('[{"prompt": "a"}]'.encode("utf-16"))
    assert "line 1: the file is UTF-16" in refused(path)


def test_missing_file_and_its_neighbours(tmp_path, monkeypatch):
    jsonl(tmp_path, rows(), "chemistry.jsonl")
    assert "no such file; did you mean chemistry.jsonl?" in refused(tmp_path / "chemisty.jsonl")
    assert "it holds chemistry.jsonl" in refused(tmp_path / "zzz.csv")
    assert "The folder" in refused(tmp_path / "nowhere" / "a.jsonl")
    monkeypatch.chdir(tmp_path.parent)
    assert "no hub dataset either" in refused(f"{tmp_path.name}/chemistry")
    assert "no hub dataset either" in refused("chemistry")
    assert refused(jsonl(tmp_path, rows()), eval_path=str(tmp_path / "no.jsonl")).startswith("data.eval_path=")


def test_folder(tmp_path):
    jsonl(tmp_path, rows(), "some.jsonl")
    assert "is a folder. Write the file: it holds some.jsonl" in refused(tmp_path)


def test_unknown_extension(tmp_path):
    path = jsonl(tmp_path, rows()).rename(tmp_path / "data.txt")
    assert "the extension '.txt' is not one of .jsonl" in refused(path)
    assert "the extension '.gz' is not one of" in refused("folder/data.jsonl.gz")


@pytest.mark.parametrize("kind, content", [
    ("jsonl", ""), ("jsonl", "\n  \n"), ("json", ""), ("json", " "), ("json", "[]"), ("json", "[ ]\n"),
    ("csv", ""), ("csv", "prompt\n"), ("parquet", ""),
])  # fmt: skip
def test_empty_file(tmp_path, kind, content):
    path = tmp_path / f"data.{kind}"
    path.write_text(content)
    assert "is empty: it has no rows" in refused(path)


@pytest.mark.parametrize("content, words", [
    ('{"data": [{"prompt": "a"}]}', "not one object. Save the list under its key 'data'"),
    ('"a"', "not str"),
    ("nonsense", "line 1: a JSON list of rows is expected"),
    ('[{"prompt": "a"},\n {"prompt": }]', "data.json, line 2: malformed JSON at column 13"),
    ('[{"prompt": "a"}\n {"prompt": "b"}]', "line 2: malformed JSON: ',' or ']' expected after a row, found '{'"),
    ('[{"prompt": "a"}', "the file ends here"),
    ('[{"prompt": "a"},]', "malformed JSON"),
    ('[{"prompt": "a"}]\n]', "line 2: malformed JSON: text after the end"),
    ('[{"prompt": "a"},\n\n3, {"prompt": "b"}]', "data.json, line 3: a row must be an object"),
])  # fmt: skip
def test_json_that_is_no_list(tmp_path, content, words):
    path = tmp_path / "data.json"
    path.write_text(content)
    assert words in refused(path)


def test_how_many_prompts_are_too_long_and_how_long_the_longest_is(tmp_path):
    prompts = ["a", "p" * 20, "p" * 50, "b", "p" * 30]
    path = jsonl(tmp_path, [{"prompt": prompt} for prompt in prompts])
    message = refused(path, max_prompt_tokens=10)
    assert "line 2: the prompt has 23 tokens, more than data.max_prompt_tokens=10" in message
    assert "so have 3 of 5 prompts, and the longest (line 3) has 53: write data.max_prompt_tokens=53." in message
    assert len(load(path, max_prompt_tokens=10, on_bad_row="skip").bad_rows) == 3
    assert len(everything(load(path, max_prompt_tokens=53))) == 5


@pytest.mark.parametrize("field", ["prompt", "answer", "other"])
def test_cells_of_megabytes_are_answered_shortly(tmp_path, field):
    huge = "word " * 400_000
    good = [{"prompt": f"p{i}", "answer": "a", "other": "x"} for i in range(5)]
    path = jsonl(tmp_path, [*good, {**good[0], field: huge}])
    if field == "prompt":
        message = refused(path, max_prompt_tokens=100)
        assert "line 6: the prompt has more than" in message and len(message) < 400
    else:
        assert len(everything(load(path))) == 6
    message = refused(jsonl(tmp_path, [*good, {**good[0], "prompt": [huge]}], "b.jsonl"))
    assert "line 6" in message and len(message) < 400
    message = refused(jsonl(tmp_path, [*good, {huge.replace(" ", ""): "x"}], "c.jsonl"))
    assert "line 6" in message and len(message) < 1000


@pytest.mark.parametrize("content, words", [
    (b"prompt,gr\xf6\xdfe\na,b\n", "line 1: is not UTF-8: it has the byte 0xf6"),
    (b"prompt,a\x00b\na,b\n", "line 1: the name of a column has a NUL character"),
])  # fmt: skip
def test_a_header_that_is_no_text(tmp_path, content, words):
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    assert words in refused(path)


def test_half_a_character_in_a_field_that_is_only_passed_on(tmp_path):
    path = jsonl(tmp_path, [{"prompt": f"p{i}", "other": [{"\ud83d": "a\ud83d"}]} for i in range(3)])
    assert everything(load(path))[0]["other"] == [{"\ufffd": "a\ufffd"}]
    path = jsonl(tmp_path, [{"prompt": f"p{i}", "other": "\ud83d!"} for i in range(3)])
    assert everything(load(path))[0]["other"] == "\ufffd!"


@pytest.mark.parametrize("content, words", [
    ("\na\n", "begins with the names of its columns"),
    ("prompt,prompt\na,b\n", "two columns are named 'prompt'"),
    ("prompt;answer\na;b\n", "separated by ';'"),
    ("prompt,answer\na,b\nc,d,e\n", "line 3: has 3 cells, the header has 2"),
    ('prompt,answer\na,b\n"c,d\n', "line 3: malformed CSV"),
    ("prompt,answer\n,b\n", "line 2: field 'prompt' is empty"),
    ("question,answer\na,b\n", "line 2: no field 'prompt' or 'messages' or 'text'"),
])  # fmt: skip
def test_bad_csv(tmp_path, content, words):
    path = tmp_path / "data.csv"
    path.write_text(content)
    assert words in refused(path)


def test_bad_parquet(tmp_path):
    path = tmp_path / "data.parquet"
    path.write_text("no parquet")
    assert "can't be read as parquet, after 0 rows" in refused(path)
    pq.write_table(pa.Table.from_pylist([{"prompt": "a"}, {"prompt": None}]), path)
    assert "data.parquet, row 2: field 'prompt' is empty" in refused(path)


def test_duplicate_ids(tmp_path):
    path = jsonl(tmp_path, [{"prompt": f"p{i}", "id": name} for i, name in enumerate("abca")])
    assert "line 4: the id 'a' is already that of line 1" in refused(path)
    assert [row["id"] for row in everything(load(path, on_bad_row="skip"))] == ["a", "b", "c"]


def test_fields_of_different_kinds(tmp_path):
    path = jsonl(tmp_path, [{"prompt": f"p{i}", "n": value} for i, value in enumerate([1, 2, "three", "four", 5, "x"])])
    message = refused(path)
    assert re.search(r"the field 'n' does not hold one kind of value in all rows: .*int \(line \d\)", message)


def test_reserved_names(tmp_path):
    assert "line 1: the field 'completions' has a name that rewards" in refused(jsonl(tmp_path, rows(completions="x")))


def test_required_fields(tmp_path):
    path = jsonl(
        tmp_path, [{"prompt": "a", "answer": None}, {"prompt": "b", "answer": "x"}, {"prompt": "c", "answer": "y"}]
    )
    assert len(everything(load(path))) == 3
    assert "line 1: field 'answer' is empty, and every row must have it" in refused(path, require=["answer"])
    assert "line 1: no field 'golden_response', and every row must" in refused(path, require=["golden_response"])
    assert "line 1: no field 'label', and every row must have it" in refused(path, answer_field="label")


def test_a_conversation_brings_its_own_demonstration(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = jsonl(tmp_path, [{"messages": messages}, {"messages": messages[:1]}])
    settings = {
        "require": ["golden_response"],
        "eval_path": str(jsonl(tmp_path, [{"messages": messages}], "eval.jsonl")),
    }
    assert "line 2: no field 'golden_response'" in refused(path, **settings)
    assert load(path, on_bad_row="skip", **settings).train["golden_response"][:] == [["a"]]


def test_all_rows_bad(tmp_path):
    message = refused(jsonl(tmp_path, [{"question": "a"}] * 3), on_bad_row="skip")
    assert "all 3 rows are bad, so nothing is left. The first: line 1: no field 'prompt'" in message


@pytest.mark.parametrize("settings, words", [
    ({"eval_fraction": 0.0}, "data.eval_fraction=0.0 must lie between 0 and 1"),
    ({"eval_fraction": 1.0}, "data.eval_fraction=1.0 must lie between 0 and 1"),
    ({"format": "jsnl"}, "data.format=jsnl: write one of jsonl, json, parquet, csv, hub; did you mean jsonl?"),
    ({"on_bad_row": "ignore"}, "data.on_bad_row=ignore: write error or skip"),
    ({"max_train_rows": 0}, "data.max_train_rows=0 must be at least 1"),
    ({"max_eval_rows": -1}, "data.max_eval_rows=-1 must be at least 1"),
    ({"prompt_tokens": 0}, "data.prompt_tokens=0 must be at least 1"),
    ({"max_prompt_tokens": 0}, "data.max_prompt_tokens=0 must be at least 1"),
    ({"prompt_tokens": 600}, "data.prompt_tokens=600 is more than data.max_prompt_tokens=512"),
    ({"prompt_tokens": 6, "system": "s"}, "data.system has no place in raw text"),
    ({"prompt_tokens": 6}, "line 1: data.prompt_tokens cuts raw text, and there is no field 'text'"),
    ({"prompt_tokens": 6}, "(write data.text_field=prompt)"),
    ({"require": ["answr"]}, "data.require=answr: write answer or golden_response; did you mean answer?"),
])  # fmt: skip
def test_bad_arguments(tmp_path, settings, words):
    assert words in refused(jsonl(tmp_path, rows()), **settings)


def test_no_limit_on_the_prompt(tmp_path):
    long = {"prompt": "p" * 3000}
    assert "the prompt has 3003 tokens" in refused(jsonl(tmp_path, [long, *rows()], "a.jsonl"))
    assert len(everything(load(jsonl(tmp_path, [long, {"prompt": "b"}]), max_prompt_tokens=None))) == 2
