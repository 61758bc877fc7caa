"""What a served teacher finds out before training: another model, another tokenizer, limits that are too low."""

from typing import Any

import pytest

from selfdistill.errors import UserError
from selfdistill.teachers.server import ServerTeacher
from selfdistill.teachers.server.client import ServerUnavailable
from tests.teachers.server.served import teacher_of
from tests.teachers.server.stub_server import LETTERS, VOCABULARY, LetterTokenizer, Reply, StubServer

TOKENIZER = LetterTokenizer()


def test_the_check_passes_and_says_what_was_found() -> None:
    with StubServer() as stub:
        teacher = teacher_of(stub, top_k=5)
        (line,) = teacher.check(TOKENIZER, longest_tokens=255, vocabulary_size=VOCABULARY)
        assert stub.url in line
        assert "256" in line
        assert "5 log-probabilities" in line
        assert teacher.scorer.context_tokens == 256
        teacher.close()


def test_constructing_a_teacher_sends_nothing() -> None:
    with StubServer() as stub:
        teacher_of(stub)
        assert stub.connections == 0


def test_an_absent_server_is_said_soon() -> None:
    teacher = ServerTeacher("http://127.0.0.1:9/v1", "stub", patience_s=0.3)
    with pytest.raises(ServerUnavailable, match=r"vllm serve"):
        teacher.check(TOKENIZER)


@pytest.mark.parametrize("mode", ["score", "write"])
def test_a_model_that_is_not_served_lists_the_served_ones(mode: Any) -> None:
    with StubServer(name="glm-4.7") as stub:
        teacher = teacher_of(stub, model="glm4.7", mode=mode)
        with pytest.raises(UserError, match=r"teacher.model=glm4.7.*It serves glm-4.7; did you mean glm-4.7"):
            teacher.check(TOKENIZER)


def test_a_k_above_the_limit_names_the_limit() -> None:
    with StubServer(max_logprobs=20) as stub:
        with pytest.raises(UserError, match=r"teacher.top_k=30.*at most 20.*--max-logprobs 30"):
            teacher_of(stub, top_k=30).check(TOKENIZER)
        with pytest.raises(UserError, match=r"teacher.top_k=null.*at most 20.*--max-logprobs -1"):
            teacher_of(stub, top_k=None).check(TOKENIZER)
        with pytest.raises(UserError, match=r"teacher.top_k=20"):
            teacher_of(stub, top_k=30).score([[1]], [[2]])


def test_a_server_that_cannot_score_is_told_from_one_that_can() -> None:
    with StubServer() as stub:
        stub.can_score = False
        with pytest.raises(UserError, match=r"cannot score.*teacher.mode=write"):
            teacher_of(stub, top_k=3).check(TOKENIZER)
        assert teacher_of(stub, mode="write").check()


def test_a_server_that_ignores_prompt_logprobs_is_found_too() -> None:
    with StubServer() as stub:
        stub.answer = lambda request: (
            Reply(body={"choices": [{"index": 0, "text": "x"}]}) if request.path == "/v1/completions" else None
        )
        with pytest.raises(UserError, match=r"cannot score"):
            teacher_of(stub, top_k=3).check(TOKENIZER)


def swapped(a: int, b: int) -> LetterTokenizer:
    letters = list(LETTERS)
    letters[a], letters[b] = letters[b], letters[a]
    return LetterTokenizer(letters)


@pytest.mark.parametrize(
    ("tokenizer", "difference"),
    [
        (swapped(1, 2), "token 1 is '2' here and '1' there"),
        (swapped(38, 39), "token 38"),
        (LetterTokenizer([*LETTERS, "é"]), "token 40 is 'é' here"),
        (LetterTokenizer(LETTERS[:-1]), "token 39 is 'W' there, and here the vocabulary ends"),
    ],
)
def test_another_tokenizer_is_an_error_that_shows_the_difference(tokenizer: LetterTokenizer, difference: str) -> None:
    with StubServer() as stub, pytest.raises(UserError, match=r"another tokenizer") as error:
        teacher_of(stub, top_k=3).check(tokenizer)
    assert difference in str(error.value)
    assert "teacher.mode=write" in str(error.value)


def test_without_a_tokenize_endpoint_the_probe_still_compares() -> None:
    with StubServer() as stub:
        stub.can_tokenize = False
        assert teacher_of(stub, top_k=3).check(TOKENIZER)
        with pytest.raises(UserError, match=r"another tokenizer"):
            teacher_of(stub, top_k=3).check(swapped(LETTERS.index("1"), LETTERS.index("2")))


def test_a_context_that_is_too_short_is_found_before_training_and_while_it_runs() -> None:
    with StubServer(context=64) as stub:
        teacher = teacher_of(stub, top_k=3)
        with pytest.raises(UserError, match=r"context of 64 tokens.*can take 64.*--max-model-len 65"):
            teacher.check(TOKENIZER, longest_tokens=64)
        teacher.check(TOKENIZER, longest_tokens=63)
        teacher.score([[1] * 60], [[2, 3, 4]])
        with pytest.raises(UserError, match=r"60 tokens and the completion of 4 do not fit into the 64"):
            teacher.score([[1] * 60], [[2, 3, 4, 5]])
        teacher.close()
        unchecked = teacher_of(stub, top_k=3)
        with pytest.raises(UserError, match=r"maximum context length is 64"):
            unchecked.score([[1] * 60], [[2, 3, 4, 5]])


def test_tokens_the_student_does_not_have_are_refused() -> None:
    with StubServer() as stub:
        teacher = teacher_of(stub, top_k=None)
        teacher.scorer.vocabulary_size = VOCABULARY - 1
        with pytest.raises(UserError, match=r"token 39; the student's vocabulary has 39"):
            teacher.score([[1]], [[2]])


def test_of_several_servers_each_is_checked_and_an_absent_one_is_left_out() -> None:
    with StubServer() as a, StubServer() as b, StubServer(seed=5) as other:
        assert len(teacher_of(a, b, top_k=3).check(TOKENIZER)) == 2
        with pytest.raises(UserError, match=r"different models"):
            teacher_of(a, other, top_k=3).check(TOKENIZER)
        b.stop()
        lines = teacher_of(a, b, top_k=3, patience_s=0.2).check(TOKENIZER)
        assert "does not answer" in lines[1]


@pytest.mark.parametrize(
    "setting", [{"top_k": -1}, {"samples": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"max_tokens": 0}]
)
def test_settings_that_make_no_sense_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        ServerTeacher("http://127.0.0.1:9/v1", "stub", **setting)
