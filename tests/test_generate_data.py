"""Generated data, against a stub that writes: rows, split, what is rejected, and continuing."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from selfdistill import generate_data
from selfdistill.config import doors
from selfdistill.config.conf import CONF
from selfdistill.errors import UserError
from selfdistill.rewards import ExactMatch
from selfdistill.teachers.server import client
from selfdistill.teachers.server.client import ServerUnavailable
from selfdistill.teachers.server.dataset import DatasetSettings
from selfdistill.teachers.server.dataset import generate as generate_dataset
from selfdistill.teachers.server.prompt_sources import FilePrompts, normal, read_prompts
from tests.command import command, composed
from tests.teachers.server.stub_server import Reply, Request, StubServer, chat_reply

PRIMARY = CONF / "_commands" / "generate_data.yaml"


def generate(stub: StubServer, folder: Path, *arguments: str) -> int:
    """How many rows are missing after the command with these arguments."""
    cfg = composed([f"base_url={stub.url}", "model=stub", f"output={folder}", "patience_s=2", *arguments], PRIMARY)
    return generate_dataset(doors.typed(DatasetSettings, cfg), doors.built(cfg, "keep"))


def rows_of(folder: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    return tuple(
        json.loads((folder / name).read_text()) for name in ("train_data.json", "eval_data.json", "report.json")
    )  # type: ignore[return-value]


def prompts_file(folder: Path, count: int) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"question {i}", "answer": str(i)}) for i in range(count)))
    return path


def test_rows_in_the_required_form_and_a_split_without_overlap(tmp_path: Path) -> None:
    with StubServer() as stub:
        code = generate(stub, tmp_path, f"prompts={prompts_file(tmp_path, 40)}", "train_samples=20", "eval_samples=5")
        asked = len(stub.asked("chat/completions"))
    train, evaluation, report = rows_of(tmp_path)
    assert (code, len(train), len(evaluation), asked) == (0, 20, 5, 25)
    for row in train + evaluation:
        assert row["golden_response"] == [f"re: {row['prompt']}"]
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in evaluation}
    assert (report["train"], report["eval"], report["rejected"]) == (20, 5, [])


def test_the_files_can_be_loaded_as_training_data(tmp_path: Path) -> None:
    with StubServer() as stub:
        generate(
            stub,
            tmp_path,
            f"prompts={prompts_file(tmp_path, 6)}",
            "train_samples=4",
            "eval_samples=2",
            "system=Be brief.",
        )
    loaded = FilePrompts(str(tmp_path / "train_data.json"), None)._left
    assert len(loaded) == 4
    assert loaded[0].messages[0] == {"role": "system", "content": "Be brief."}


def test_the_same_settings_ask_nothing_again_and_give_the_same_files(tmp_path: Path) -> None:
    arguments = (f"prompts={prompts_file(tmp_path, 30)}", "train_samples=10", "eval_samples=5")
    with StubServer() as stub:
        generate(stub, tmp_path, *arguments)
        first = rows_of(tmp_path)[:2]
        asked = len(stub.asked("chat/completions"))
        generate(stub, tmp_path, *arguments)
        assert rows_of(tmp_path)[:2] == first
        assert len(stub.asked("chat/completions")) == asked
        generate(stub, tmp_path, *arguments[:1], "train_samples=15", "eval_samples=5")
        assert len(stub.asked("chat/completions")) == asked + 5


def test_after_an_interruption_only_what_is_missing_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (f"prompts={prompts_file(tmp_path, 30)}", "train_samples=20", "eval_samples=10", "max_concurrency=2")
    with StubServer() as stub:
        stub.answer = lambda request: (
            Reply(fault="reset") if len(stub.asked("chat/completions")) > 12 and "chat" in request.path else None
        )
        with pytest.raises(ServerUnavailable):
            generate(stub, tmp_path, *arguments)
        assert "the same command continues" in capsys.readouterr().err
        assert not (tmp_path / "train_data.json").exists()
        stub.answer = lambda request: None
        stub.requests.clear()
        assert generate(stub, tmp_path, *arguments) == 0
        assert len(stub.asked("chat/completions")) == 30 - 12
    train, evaluation, _ = rows_of(tmp_path)
    assert len(train) == 20
    assert len(evaluation) == 10


def test_topics_give_prompts_without_duplicates_and_known_ones_are_shown(tmp_path: Path) -> None:
    def write(messages: list[dict[str, str]], i: int) -> str:
        text = messages[-1]["content"]
        if "different requests" not in text:
            return f"re: {text}"
        start = text.count("Request about")
        topic = "food" if "food" in text else "travel"
        numbers = range(start, start + 4)
        return "Here they are:\n" + "\n".join(f"{n + 1}. Request about {topic}, number {n}" for n in [*numbers, start])

    topics = tmp_path / "topics.txt"
    topics.write_text("food\n\ntravel\nfood\n")
    with StubServer() as stub:
        stub.write = write
        assert (
            generate(stub, tmp_path, f"topics={topics}", "train_samples=9", "eval_samples=2", "prompts_per_request=4")
            == 0
        )
        requests = [r.body["messages"][-1]["content"] for r in stub.asked("chat/completions")]
        assert sum("There" in r or "These are there already" in r for r in requests) == 2
    train, evaluation, report = rows_of(tmp_path)
    prompts = [row["prompt"] for row in train + evaluation]
    assert len(set(prompts)) == 11
    assert all(prompt.startswith("Request about ") for prompt in prompts)
    assert report["counts"]["duplicate prompt"] == 4


def test_topics_that_run_dry_end_with_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StubServer() as stub:
        stub.write = lambda messages, i: "1. only this" if "different" in messages[-1]["content"] else "fine"
        assert generate(stub, tmp_path, "topics=[food]", "train_samples=4", "eval_samples=1") == 4
    train, evaluation, report = rows_of(tmp_path)
    assert [row["prompt"] for row in train + evaluation] == ["only this"]
    assert report["counts"]["duplicate prompt"] >= 1
    assert "4 rows fewer than wanted" in capsys.readouterr().out


def test_too_few_prompts_are_shared_out_in_proportion(tmp_path: Path) -> None:
    with StubServer() as stub:
        path = prompts_file(tmp_path, 12)
        assert generate(stub, tmp_path, f"prompts={path}", "train_samples=20", "eval_samples=10") == 18
    train, evaluation, _ = rows_of(tmp_path)
    assert (len(train), len(evaluation)) == (8, 4)


def test_what_is_rejected_is_reported_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    good = [json.dumps({"prompt": f"question {i}"}) for i in range(4)]
    path.write_text("\n".join([*good, '{"prompt": "Question  0!"}', "{broken", '{"other": 1}']))

    def answer(request: Request) -> Reply | None:
        text = request.body["messages"][-1]["content"] if request.body and "messages" in request.body else ""
        if text == "question 1":
            return Reply(body=chat_reply(["half a"], finish="length"))
        return Reply(body=chat_reply([""])) if text == "question 2" else None

    with StubServer() as stub:
        stub.answer = answer
        assert generate(stub, tmp_path, f"prompts={path}", "train_samples=4", "eval_samples=0") == 2
    train, _, report = rows_of(tmp_path)
    assert len(train) == 2
    assert report["counts"] == {
        "response cut off at max_tokens": 1,
        "response empty": 1,
        "prompt without a response to keep": 2,
        "duplicate prompt": 1,
        "row that cannot be read": 2,
    }
    unread = [item["prompt"] for item in report["rejected"] if item["reason"] == "row that cannot be read"]
    assert any("line 6" in text for text in unread)


def test_a_reward_decides_what_is_kept_and_several_samples_are_kept(tmp_path: Path) -> None:
    with StubServer() as stub:
        stub.write = lambda messages, i: messages[-1]["content"].split()[-1] if i != 1 else "wrong"
        generate(
            stub, tmp_path, f"prompts={prompts_file(tmp_path, 4)}", "train_samples=3", "eval_samples=1", "samples=3",
            f"+keep._target_={ExactMatch.__module__}.ExactMatch",
        )  # fmt: skip
    train, evaluation, report = rows_of(tmp_path)
    for row in train + evaluation:
        assert row["golden_response"] == [row["prompt"].split()[-1]]
    assert report["counts"] == {"response not accepted by the reward": 4}


def test_the_golden_response_is_shown_when_asked_for_and_not_in_the_data(tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"prompt": "p", "golden_response": ["g1", "g2"]}, {"prompt": "q"}]))
    with StubServer() as stub:
        generate(
            stub, tmp_path, f"prompts={path}", "train_samples=2", "eval_samples=0", "show_golden_response=true",
            "golden_template='{prompt} / {demonstration}'",
        )  # fmt: skip
    train, _, _ = rows_of(tmp_path)
    assert train == [
        {"prompt": "p", "golden_response": ["re: p / g1\ng2"]},
        {"prompt": "q", "golden_response": ["re: q"]},
    ]


@pytest.mark.parametrize("key", ["prompts", "topics"])
def test_an_absent_file_is_said_before_any_server_is_asked(key: str, tmp_path: Path) -> None:
    with StubServer() as stub:
        with pytest.raises(UserError, match=rf"{key}=absent\.txt"):
            generate(stub, tmp_path, f"{key}=absent.txt")
        with pytest.raises(UserError, match=r"topic_template lacks \{count\}"):
            generate(stub, tmp_path, "topics=[food]", "topic_template='about {topic}'")
        assert not stub.requests


def test_an_absent_server_is_said_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "START_PATIENCE_S", 0.3)
    outcome = command(
        ["model=m", "topics=[food]", "base_url=http://127.0.0.1:9/v1", "patience_s=300"], tmp_path, generate_data
    )
    assert (outcome.code, outcome.left) == (2, set())
    assert "No usable answer from http://127.0.0.1:9/v1" in outcome.err
    assert "base_url=http://HOST:PORT/v1" in outcome.err
    assert "Waiting longer" not in outcome.err  # it would not be waited for longer


def test_settings_reach_the_server(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo\n")
    with StubServer() as stub:
        generate(
            stub, tmp_path, f"prompts={path}", "train_samples=1", "eval_samples=1", "temperature=0.2",
            "max_tokens=33", "stop=['##']", "+chat_template_kwargs.enable_thinking=false", "system=S",
        )  # fmt: skip
        body = stub.asked("chat/completions")[0].body
    assert body["messages"] == [{"role": "system", "content": "S"}, {"role": "user", "content": "one"}]
    assert (body["temperature"], body["max_tokens"], body["stop"]) == (0.2, 33, ["##"])
    assert body["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=m"], "Write either prompts=FILE, or topics=FILE"),
        (["model=m", "prompts=a.txt", "topics=b.txt"], "Write either"),
        (["prompts=a.txt"], "model is missing"),
        (["model=m", "prompt=a.txt"], "prompt is not a key: did you mean prompts?"),
        (["model=m", "train_sample=3"], "did you mean train_samples?"),
        (["model=m", "zzz=3"], "zzz is not a key: known here: "),
        (["model=m", "prompts=a.txt", "train_samples=many"], "train_samples: "),
        (["model=m", "prompts=a.txt", "train_samples=0", "eval_samples=0"], "nothing to generate"),
        (["model=m", "prompts=a.txt", "samples=0"], "samples=0: must be at least 1"),
        (["model=m", "prompts=a.txt", "eval_samples=-1"], "eval_samples=-1"),
        (["model=m", "prompts=a.txt", "keep=ExactMatch"], "keep is a reward by its path"),
        (["model=m", "prompts=a.txt", "+keep._target_=os.system"], "trusted_prefixes=[os]"),
        (["model=m", "prompts=a.txt", "+keep._target_=selfdistill.rewards.Nothing"], "has no Nothing"),
        (
            ["model=m", "prompts=a.txt", "+keep._target_=selfdistill.rewards.ExactMatch", "+keep.fast=true"],
            "keep.fast: selfdistill.rewards.ExactMatch takes no such argument",
        ),
        (["model=m", "prompts=a.txt", "base_url=nowhere"], "base_url=nowhere: not an http URL"),
        (["model"], "model cannot be read"),
        (["+zzz=3", "model=m", "prompts=a.txt"], "zzz is not a key"),
        (["model=a,b", "prompts=a.txt"], "several values are a sweep"),
        (["--multirun", "model=a,b"], "--multirun is for selfdistill.train alone"),
        (["--chekc"], "--chekc is not a flag"),
    ],
)
def test_wrong_commands_are_refused_with_one_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    outcome = command(arguments, tmp_path, generate_data)
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.left == set()


def test_the_command_writes_the_files_and_says_by_its_code_whether_there_are_enough(tmp_path: Path) -> None:
    with StubServer() as stub:
        arguments = [f"base_url=[{stub.url}]", "model=stub", f"prompts={prompts_file(tmp_path, 3)}", "eval_samples=1"]
        outcome = command([*arguments, "train_samples=2"], tmp_path, generate_data)
        assert (outcome.code, outcome.err) == (0, "")
        assert {f"data/generated/{name}.json" for name in ("train_data", "eval_data", "report")} <= outcome.left
        assert not {name for name in outcome.left if name.startswith(("outputs", ".hydra"))}
        outcome = command([*arguments, "train_samples=3"], tmp_path, generate_data)
    assert outcome.code == 1
    assert "1 rows fewer than wanted" in outcome.out


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("missing.jsonl", None, "missing.jsonl"),
        ("missing.txt", None, "No such file"),
        ("empty.txt", b"\n\n", "no usable prompt"),
        ("latin.txt", b"caf\xe9", "UTF-8"),
        ("rows.jsonl", b'{"other": 1}', "no usable prompt in it. .*line 1"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path: Path, file: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with StubServer() as stub, pytest.raises(UserError, match=message):
        generate(stub, tmp_path / "out", f"prompts={tmp_path / file}")


def test_help_names_every_key_with_what_it_means(tmp_path: Path) -> None:
    outcome = command(["--help"], tmp_path, generate_data)
    assert (outcome.code, outcome.err) == (0, "")
    explained = {line.split(":")[0] for line in outcome.out.splitlines() if "  # " in line}
    assert {field.name for field in fields(DatasetSettings)} <= explained
    assert "hydra:" not in outcome.out


def test_prompts_that_differ_in_form_alone_are_the_same() -> None:
    assert normal("Write a  Poem!") == normal("write a poem")
    assert normal("What is 3 + 4?") != normal("What is 3 - 4?")
    assert normal("???") != normal("!!!")


@pytest.mark.parametrize(
    ("answer", "prompts"),
    [
        ("1. a\n2) b\n 3: c", ["a", "b", "c"]),
        ("Sure:\n- a\n* b\nEnjoy!", ["a", "b"]),
        ('["a", "b "]', ["a", "b"]),
        ('```json\n["a"]\n```', ["a"]),
        ("a\n\nb", ["a", "b"]),
        ('1. "a"', ["a"]),
        ("", []),
    ],
)
def test_prompts_are_read_out_of_answers(answer: str, prompts: list[str]) -> None:
    assert read_prompts(answer) == prompts
