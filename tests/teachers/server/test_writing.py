"""A served teacher that writes demonstrations."""

from typing import Any

import pytest

from selfdistill.errors import UserError
from selfdistill.teachers.server import ServerTeacher
from selfdistill.teachers.server.writing import show_golden
from tests.teachers.server.served import teacher_of
from tests.teachers.server.stub_server import Reply, StubServer, chat_reply, refusal


def test_it_writes_a_demonstration_for_each_prompt_in_order() -> None:
    with StubServer() as stub:
        teacher = teacher_of(stub, mode="write", samples=2, temperature=0.5, max_tokens=9, stop=["\n"], seed=3)
        stub.write = lambda messages, i: f"{messages[-1]['content']}/{i}"
        conversation = [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}]
        assert teacher.write(["a", conversation]) == [["a/0", "a/1"], ["b/0", "b/1"]]
        body = stub.asked("chat/completions")[0].body
        assert {"n": 2, "temperature": 0.5, "max_tokens": 9, "stop": ["\n"], "seed": 3}.items() <= body.items()
        assert "chat_template_kwargs" not in body
        teacher.close()


def test_thinking_can_be_turned_off_and_is_removed_where_it_is_not() -> None:
    with StubServer() as stub:
        teacher = teacher_of(stub, mode="write", chat_template_kwargs={"enable_thinking": False})
        stub.write = lambda messages, i: "let me see\n</think>\n\nthe answer"
        assert teacher.write(["a"]) == [["the answer"]]
        assert stub.requests[0].body["chat_template_kwargs"] == {"enable_thinking": False}
        teacher.close()


def test_the_golden_response_stands_in_the_last_user_turn() -> None:
    turns = [
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "q2"},
    ]
    shown = show_golden(turns, ["g"], "{prompt} <- {demonstration}")
    assert shown == [*turns[:2], {"role": "user", "content": "q2 <- g"}]
    with pytest.raises(UserError, match=r"no user turn"):
        show_golden(turns[1:2], ["g"], "{prompt} <- {demonstration}")


def test_a_response_that_is_all_thinking_is_none() -> None:
    with StubServer() as stub, teacher_of(stub, mode="write", samples=2) as teacher:
        stub.write = lambda messages, i: ["<think>I wonder", "<think>2 + 2</think>4"][i]
        (written,) = teacher.write_async(["a"]).result()
        assert (written.kept, written.rejected) == (["4"], [("", "empty")])


def test_a_reward_that_returns_nonsense_is_refused_by_name() -> None:
    message = r"reward function keep, row 0: the score is str 'good'"
    with StubServer() as stub, pytest.raises(UserError, match=message):
        teacher_of(stub, mode="write", keep=lambda **given: ["good"]).write(["a"])


def test_the_golden_response_is_shown_only_when_asked_for() -> None:
    with StubServer() as stub:
        for show in (False, True):
            teacher = teacher_of(
                stub, mode="write", show_golden_response=show, golden_template="{prompt}|{demonstration}"
            )
            written = teacher.write(["q {x}", "p"], golden=[["g {prompt}", "h"], []])
            assert written == [[f"re: q {{x}}{'|g {prompt}' + chr(10) + 'h' if show else ''}"], ["re: p"]]
            teacher.close()


def test_a_golden_template_without_its_places_is_refused() -> None:
    teacher = ServerTeacher(
        "http://127.0.0.1:9/v1", "m", mode="write", show_golden_response=True, golden_template="{prompt}"
    )
    with pytest.raises(UserError, match=r"demonstration"):
        teacher.write(["q"], golden=[["g"]])


def likes_even(
    prompts: list[Any], completions: list[Any], completion_ids: Any, answer: list[str], **rest: Any
) -> list[Any]:
    assert answer == ["x"]
    text = completions[0] if isinstance(completions[0], str) else completions[0][0]["content"]
    number = int(text.split("/")[1])
    return [None if number == 3 else {"score": 1.0 if number % 2 == 0 else 0.0, "feedback": "f"}]


@pytest.mark.parametrize("prompt", ["a", [{"role": "user", "content": "a"}]])
def test_only_what_the_reward_accepts_is_kept(prompt: Any) -> None:
    with StubServer() as stub:
        teacher = teacher_of(stub, mode="write", samples=5, keep=likes_even)
        stub.write = lambda messages, i: f"{messages[-1]['content']}/{i}"
        (written,) = teacher.write_async([prompt], columns=[{"answer": "x"}]).result()
        assert written.kept == ["a/0", "a/2", "a/4"]
        assert [reason for _, reason in written.rejected] == ["not accepted by the reward"] * 2
        teacher.close()


def test_cut_off_and_empty_responses_are_not_demonstrations() -> None:
    with StubServer() as stub:
        teacher = teacher_of(stub, mode="write")
        stub.answer = lambda request: Reply(body=chat_reply(["half a sen"], finish="length"))
        assert teacher.write(["a"]) == [[]]
        stub.answer = lambda request: Reply(body=chat_reply(["  \n"]))
        (written,) = teacher.write_async(["a"]).result()
        assert written.rejected == [("  \n", "empty")]
        teacher.close()


def test_a_server_that_ignores_n_is_asked_until_there_are_enough() -> None:
    with StubServer() as stub:
        teacher = teacher_of(stub, mode="write", samples=3, seed=10)
        stub.answer = lambda request: Reply(body=chat_reply([f"seed {request.body['seed']}"]))
        assert teacher.write(["a"]) == [["seed 10", "seed 11", "seed 12"]]
        teacher.close()


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"choices": []},
        {"choices": [{}]},
        {"choices": [{"message": {"content": 5}}]},
        [],
        {"choices": [{"message": "a"}]},
    ],
)
def test_a_chat_reply_of_the_wrong_shape_is_asked_again(body: Any) -> None:
    with StubServer() as stub:
        teacher = teacher_of(stub, mode="write")
        left = [1]
        stub.answer = lambda request: Reply(body=body) if left and left.pop() else None
        assert teacher.write(["a"]) == [["re: a"]]
        assert len(stub.requests) == 2
        teacher.close()


def test_written_responses_are_cached_sample_by_sample(tmp_path: Any) -> None:
    with StubServer() as stub:
        for temperature in (1.0, 1.0, 0.5):
            teacher = teacher_of(stub, mode="write", cache=str(tmp_path), temperature=temperature)
            assert teacher.write(["a", "b"]) == [["re: a"], ["re: b"]]
            teacher.close()
        assert len(stub.asked("chat/completions")) == 4


def test_a_refusal_while_writing_is_told_as_it_is() -> None:
    with StubServer() as stub:
        stub.answer = lambda request: refusal(400, "maximum context length is 10 tokens")
        with pytest.raises(UserError, match=r"maximum context length is 10"):
            teacher_of(stub, mode="write").write(["a"])
