import pytest

from selfdistill.errors import UserError
from tests.data.helpers import jsonl, load, rows, tokenizer

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if think %}think{% endif %}{% if add_generation_prompt %}> {% endif %}"
)


def template(folder, text):
    path = folder / "chat.jinja"
    path.write_text(text)
    return str(path)


def test_a_file_replaces_the_tokenizers_template(tmp_path):
    own = tokenizer()
    load(jsonl(tmp_path, rows()), tokenizer=own, chat_template=template(tmp_path, TEMPLATE))
    assert own.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "[user] x\n"


def test_the_limit_counts_the_rendered_prompt(tmp_path):
    path = jsonl(tmp_path, rows(5))
    # "question 0" has 10 characters, the template's frame 10 more, and `think` 5.
    settings = {"chat_template": template(tmp_path, TEMPLATE), "max_prompt_tokens": 20}
    assert len(load(path, **settings).train) == 4
    with pytest.raises(UserError, match="line 1: the prompt has 25 tokens"):
        load(path, chat_template_kwargs={"think": True}, **settings)


def test_without_a_template_prompts_are_text(tmp_path):
    own = tokenizer()
    own.chat_template = None
    splits = load(jsonl(tmp_path, rows(5)), tokenizer=own, chat_template="none")
    assert all(isinstance(row["prompt"], str) for row in splits.train)
    with pytest.raises(UserError, match=r"write data.chat_template=default"):
        load(jsonl(tmp_path, [{"messages": [{"role": "user", "content": "x"}]}]), chat_template="none")


def test_a_tokenizer_without_a_template(tmp_path):
    own = tokenizer()
    own.chat_template = None
    with pytest.raises(UserError, match=r"no chat template. Write data.chat_template=none"):
        load(jsonl(tmp_path, rows()), tokenizer=own)


@pytest.mark.parametrize("text, words", [
    ("{% for message in messages %}\n{{ message['content'] }}\n{% endfro %}", "line 3: the template fails"),
    ("{{ messages[0]['content'] | nothing }}", "the template fails on one user message"),
    ("{{ raise_exception('not today') }}", "not today"),
    ("{{ 'x' * 10**15 }}", "user message: MemoryError"),  # Python's own has no words
    ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    ("hello", "leaves out what the user says"),
    ("", "leaves out what the user says"),
])  # fmt: skip
def test_broken_templates(tmp_path, text, words):
    with pytest.raises(UserError, match=r"^data.chat_template=.*chat.jinja") as error:
        load(jsonl(tmp_path, rows()), chat_template=template(tmp_path, text))
    assert words in str(error.value)


@pytest.mark.parametrize("given, words", [
    ("defualt", "did you mean default?"), ("chat.jinj", "did you mean chat.jinja?"), ("{{ messages }}", "Save it"),
])  # fmt: skip
def test_no_such_template(tmp_path, monkeypatch, given, words):
    template(tmp_path, TEMPLATE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        load(jsonl(tmp_path, rows()), chat_template=given)
    assert words in str(error.value)


def test_a_template_may_refuse_a_row(tmp_path):
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TEMPLATE
    path = jsonl(tmp_path, [{"prompt": "a"}, {"prompt": "b", "system": "s"}, {"prompt": "c"}])
    with pytest.raises(UserError, match="line 2: the chat template refuses these messages: no system here"):
        load(path, chat_template=template(tmp_path, refusing))
    skipped = load(path, chat_template=template(tmp_path, refusing), on_bad_row="skip")
    assert [bad["line"] for bad in skipped.bad_rows] == [2]


NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
)


def test_a_system_turn_goes_into_the_first_user_turn_where_it_is_refused(tmp_path):
    path = jsonl(tmp_path, rows(5, system="be brief"))
    refusing = template(tmp_path, NO_SYSTEM)
    with pytest.raises(UserError, match=r"System role not supported; data.system_turn=merge puts") as error:
        load(path, chat_template=refusing)
    assert str(error.value).startswith(str(path))
    merged = load(path, chat_template=refusing, system_turn="merge").train[0]["prompt"]
    assert [turn["role"] for turn in merged] == ["user"]
    assert merged[0]["content"].startswith("be brief\n\nquestion ")
    kept = load(path).train[0]["prompt"]
    assert [turn["role"] for turn in kept] == ["system", "user"]


def test_a_way_out_is_offered_only_where_it_is_one(tmp_path):
    refusing = template(
        tmp_path, "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}" + NO_SYSTEM
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    with pytest.raises(UserError) as error:
        load(jsonl(tmp_path, [{"messages": turns}]), chat_template=refusing)
    assert "system_turn" not in str(error.value)
    with pytest.raises(UserError, match=r"^data.system_turn=merg: write keep or merge"):
        load(jsonl(tmp_path, rows()), system_turn="merg")


def test_the_limit_counts_what_is_spelled_like_a_control_token_as_text(tmp_path):
    path = jsonl(tmp_path, [{"prompt": "<|end|>" * 10}, *rows(3)])
    with pytest.raises(UserError, match="line 1: the prompt has 73 tokens"):
        load(path, max_prompt_tokens=60)
