"""A served teacher against a stub whose every log-probability is known, and which fails on request."""

import copy
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from selfdistill.client import MalformedReply, ServerUnavailable
from selfdistill.errors import UserError
from selfdistill.teachers.scored import Scored
from selfdistill.teachers.server import ServerTeacher
from tests.stub_server import LETTERS, VOCABULARY, LetterTokenizer, Reply, Request, StubServer, chat_reply, refusal

Rows = list[list[int]]


OPEN: list[ServerTeacher] = []


@pytest.fixture(autouse=True)
def _close_teachers() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


def teacher_of(*stubs: StubServer, **settings: Any) -> ServerTeacher:
    teacher = ServerTeacher([stub.url for stub in stubs], settings.pop("model", "stub"), **settings)
    OPEN.append(teacher)
    teacher.client.backoff_s, teacher.client.backoff_limit_s = 0.005, 0.02
    return teacher


def random_rows(count: int, seed: int = 0, longest: int = 12) -> tuple[Rows, Rows]:
    rng = random.Random(seed)

    def row(low: int, high: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(rng.randint(low, high))]

    return [row(1, longest) for _ in range(count)], [row(0, longest) for _ in range(count)]


def expected(stub: StubServer, prompt: list[int], completion: list[int], k: int) -> Scored:
    """The stub's model, applied here."""
    table = torch.tensor(stub.table, dtype=torch.float64)
    before = torch.tensor([prompt[-1], *completion], dtype=torch.long)[: len(completion)]
    logprobs = table[before].reshape(len(completion), VOCABULARY)
    top = logprobs.topk(k, dim=-1)
    own = logprobs.gather(1, torch.tensor(completion, dtype=torch.long).reshape(-1, 1)).squeeze(1)
    return Scored(own.float(), top.indices, top.values.float())


def same(scored: Scored, wanted: Scored) -> bool:
    return (
        torch.allclose(scored.logprobs, wanted.logprobs, atol=1e-6)
        and scored.top_ids.shape == wanted.top_ids.shape
        and torch.equal(scored.top_ids, wanted.top_ids)
        and torch.allclose(scored.top_logprobs, wanted.top_logprobs, atol=1e-6)
    )


@pytest.mark.parametrize("top_k", [0, 1, 5, VOCABULARY - 1, VOCABULARY, None])
def test_scores_are_the_models_whatever_k(top_k: int | None) -> None:
    prompts, completions = random_rows(30)
    completions[3] = []
    k = VOCABULARY if top_k is None else top_k
    with StubServer() as stub:
        teacher = teacher_of(stub, top_k=top_k)
        for prompt, completion, scored in zip(prompts, completions, teacher.score(prompts, completions), strict=True):
            assert scored.logprobs.shape == (len(completion),)
            if completion:
                assert same(scored, expected(stub, prompt, completion, k))
            else:
                assert scored.top_ids.shape == (0, top_k or 0)
        teacher.close()


def test_only_empty_completions_ask_nothing() -> None:
    with StubServer() as stub:
        teacher = teacher_of(stub, top_k=3)
        assert [len(scored.logprobs) for scored in teacher.score([[1], [2, 3]], [[], []])] == [0, 0]
        assert teacher.score([], []) == []
        assert stub.requests == []
        teacher.close()


def test_minus_infinity_arrives_as_minus_infinity() -> None:
    with StubServer() as stub:
        stub.table[1] = [0.0] + [float("-inf")] * (VOCABULARY - 1)
        teacher = teacher_of(stub, top_k=3)
        scored = teacher.score([[1]], [[7]])[0]
        assert scored.logprobs.tolist() == [float("-inf")]
        assert scored.top_logprobs.tolist() == [[0.0, float("-inf"), float("-inf")]]
        teacher.close()


def test_rows_share_requests_and_every_connection_has_work() -> None:
    prompts, completions = random_rows(32)
    with StubServer(latency_s=0.02) as stub:
        teacher = teacher_of(stub, max_concurrency=4, top_k=1)
        teacher.score(prompts, [c or [1] for c in completions])
        sizes = [len(request.body["prompt"]) for request in stub.asked("completions")]
        assert sum(sizes) == 32
        assert len(sizes) == 4
        assert stub.most_at_once == 4
        teacher.close()


def test_long_rows_are_not_sent_together() -> None:
    with StubServer(context=4000) as stub:
        teacher = teacher_of(stub, max_concurrency=1, top_k=0)
        teacher.score([[1] * 900] * 5, [[2]] * 5)
        assert max(len(request.body["prompt"]) for request in stub.asked("completions")) == 2
        teacher.close()


def test_scoring_goes_on_while_the_student_is_busy() -> None:
    with StubServer(latency_s=0.05) as stub:
        teacher = teacher_of(stub, top_k=2)
        future = teacher.score_async([[1, 2]], [[3]])
        assert not future.done()
        assert same(future.result(timeout=30)[0], expected(stub, [1, 2], [3], 2))
        teacher.close()


def test_a_prompt_without_tokens_is_a_programming_error() -> None:
    teacher = ServerTeacher("http://127.0.0.1:9/v1", "stub")
    with pytest.raises(ValueError, match=r"without tokens"):
        teacher.score([[]], [[1]])
    with pytest.raises(ValueError, match=r"2 prompts for 1 completions"):
        teacher.score([[1], [2]], [[1]])


# Replies that are not what was asked for.


def entry(reply: dict[str, Any], position: int = 1) -> dict[str, Any]:
    return reply["choices"][0]["prompt_logprobs"][position]


def set_logprob(value: Any) -> Callable[[dict[str, Any]], Any]:
    def corrupt(reply: dict[str, Any]) -> None:
        first = next(iter(entry(reply, 2)))
        entry(reply, 2)[first]["logprob"] = value

    return corrupt


def drop_token(reply: dict[str, Any]) -> None:
    entry(reply, 2).pop(next(iter(entry(reply, 2))))


def swap_rows(reply: dict[str, Any]) -> None:
    first, second = reply["choices"]
    first["index"], second["index"] = 1, 0


def other_tokens(reply: dict[str, Any]) -> None:
    for choice in reply["choices"]:
        choice.pop("prompt_token_ids")
        choice["prompt_logprobs"][1:] = [{"39": {"logprob": -0.1}} for _ in choice["prompt_logprobs"][1:]]


CORRUPTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no choices": lambda reply: reply.pop("choices"),
    "choices null": lambda reply: reply.update(choices=None),
    "a choice too few": lambda reply: reply["choices"].pop(),
    "a choice twice": lambda reply: reply["choices"].append(copy.deepcopy(reply["choices"][0])),
    "choices not tables": lambda reply: reply.update(choices=[1, 2]),
    "rows swapped": swap_rows,
    "index a text": lambda reply: reply["choices"][0].update(index="0"),
    "no logprobs": lambda reply: reply["choices"][0].pop("prompt_logprobs"),
    "a position too few": lambda reply: reply["choices"][0]["prompt_logprobs"].pop(),
    "a position too many": lambda reply: reply["choices"][0]["prompt_logprobs"].append(entry(reply)),
    "shifted by one": lambda reply: reply["choices"][0]["prompt_logprobs"].insert(
        0, reply["choices"][0]["prompt_logprobs"].pop()
    ),
    "null in the middle": lambda reply: reply["choices"][0]["prompt_logprobs"].__setitem__(1, None),
    "first not null": lambda reply: reply["choices"][0]["prompt_logprobs"].__setitem__(0, entry(reply)),
    "a list for a position": lambda reply: reply["choices"][0]["prompt_logprobs"].__setitem__(2, [1]),
    "keys not numbers": lambda reply: entry(reply, 2).update({"a": {"logprob": -1.0}}),
    "a huge key": lambda reply: entry(reply, 2).update({"9" * 40: {"logprob": -1.0}}),
    "a negative key": lambda reply: entry(reply, 2).update({"-1": {"logprob": -30.0}}),
    "a value not a table": lambda reply: entry(reply, 2).update({next(iter(entry(reply, 2))): -1.0}),
    "NaN": set_logprob(float("nan")),
    "infinity": set_logprob(float("inf")),
    "null": set_logprob(None),
    "text": set_logprob("-1.0"),
    "true": set_logprob(True),
    "above 0": set_logprob(0.7),
    "probabilities beyond 1": lambda reply: [value.update(logprob=-0.1) for value in entry(reply, 2).values()],
    "a token dropped": drop_token,
    "too many tokens": lambda reply: entry(reply, 2).update({"38": {"logprob": -30.0}, "37": {"logprob": -30.0}}),
    "own token unlikely yet left out": lambda reply: entry(reply, 2).__setitem__("5", {"logprob": -0.0001}),
    "other token ids echoed": lambda reply: reply["choices"][0].update(prompt_token_ids=[1, 2]),
    "other tokens scored": other_tokens,
}
ROWS: tuple[Rows, Rows] = ([[1, 2], [3, 4, 5]], [[5, 6, 7], [8, 9]])


def corrupted(stub: StubServer, request: Request, corrupt: Callable[[dict[str, Any]], Any]) -> Reply:
    reply = copy.deepcopy(stub._answer(request))
    corrupt(reply.body)
    return reply


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_wrong_reply_is_asked_again_and_never_used(name: str) -> None:
    """The corrupted reply comes once; what is returned is right."""
    with StubServer() as stub:
        teacher = teacher_of(stub, top_k=3, max_concurrency=1)
        left = [1]

        def answer(request: Request) -> Reply | None:
            if left.pop() if left else 0:
                return corrupted(stub, request, CORRUPTIONS[name])
            return None

        stub.answer = answer
        for prompt, completion, scored in zip(*ROWS, teacher.score(*ROWS), strict=True):
            assert same(scored, expected(stub, prompt, completion, 3))
        assert len(stub.asked("completions")) == 2, "the corruption went unnoticed"
        teacher.close()


def test_a_server_that_only_sends_wrong_replies_ends_with_what_is_wrong() -> None:
    with StubServer() as stub:
        teacher = teacher_of(stub, top_k=3)
        stub.answer = lambda request: corrupted(stub, request, CORRUPTIONS["NaN"])
        with pytest.raises(MalformedReply, match=r"completions that cannot be used.*NaN"):
            teacher.score(*ROWS)
        teacher.close()


def test_a_thousand_faulty_replies() -> None:
    """Faults drawn at random until a thousand have been sent: right values or a clear message, and always an end."""
    rng = random.Random(0)
    sent: dict[str, int] = {}
    kinds = ["hang", "reset", "half", "status", "json", *CORRUPTIONS]
    lock = threading.Lock()

    def answer(request: Request) -> Reply | None:
        with lock:
            if rng.random() < 0.5:
                return None
            kind = rng.choices(kinds, [0.4, 3, 3, 5, 2, *([0.7] * len(CORRUPTIONS))])[0]
            sent[kind] = sent.get(kind, 0) + 1
            status = rng.choice([408, 429, 500, 502, 503, 504])
        if kind == "status":
            return Reply(status, {}, {"retry-after": "0.01"} if status == 429 else {})
        if kind == "json":
            return Reply(raw=b'{"choices": [')
        if kind in ("hang", "reset", "half"):
            return Reply(body=stub._answer(request).body, fault=kind)
        try:
            return corrupted(stub, request, CORRUPTIONS[kind])
        except (IndexError, KeyError, ValueError, StopIteration):
            return Reply(500, {})  # this reply is too short for this corruption

    right = messages = round_number = 0
    with StubServer() as stub:
        stub.answer = answer
        teacher = teacher_of(stub, top_k=3, max_concurrency=16, timeout_s=1.0, patience_s=60.0)
        while sum(sent.values()) < 1000 and round_number < 60:
            prompts, completions = random_rows(40, seed=round_number)
            round_number += 1
            futures = [teacher.score_async([p], [c]) for p, c in zip(prompts, completions, strict=True)]
            for prompt, completion, future in zip(prompts, completions, futures, strict=True):
                error = future.exception(timeout=60)
                if error is None:
                    assert not completion or same(future.result()[0], expected(stub, prompt, completion, 3))
                    right += 1
                else:
                    assert isinstance(error, MalformedReply | ServerUnavailable)
                    assert stub.url in str(error)
                    messages += 1
        teacher.close()
    assert sum(sent.values()) >= 1000
    assert len(sent) == len(kinds), f"not every kind was drawn: {set(kinds) - set(sent)}"
    assert right > 4 * messages


# The cache.


def test_the_cache_answers_another_run_at_another_address(tmp_path: Any) -> None:
    prompts, completions = random_rows(10)
    with StubServer() as first, StubServer() as second:
        for stub in (first, second):
            teacher = teacher_of(stub, top_k=4, cache=str(tmp_path))
            for prompt, completion, scored in zip(
                prompts, completions, teacher.score(prompts, completions), strict=True
            ):
                assert not completion or same(scored, expected(stub, prompt, completion, 4))
            teacher.close()
        scored_there = [row for request in second.asked("completions") for row in request.body["prompt"]]
        assert len(scored_there) == 1, "all but the probe was to come from the cache"


def test_the_cache_serves_rows_in_any_company_and_split_the_same_row_by_where_the_completion_begins(
    tmp_path: Any,
) -> None:
    with StubServer() as stub:
        teacher = teacher_of(stub, top_k=4, cache=str(tmp_path), max_concurrency=1)
        teacher.score([[1, 2], [3]], [[4, 5], [6]])
        before = len(stub.asked("completions"))
        again = teacher.score([[3], [1, 2]], [[6], [4, 5]])
        assert len(stub.asked("completions")) == before
        assert same(again[1], expected(stub, [1, 2], [4, 5], 4))
        longer = teacher.score([[1]], [[2, 4, 5]])[0]
        assert same(longer, expected(stub, [1], [2, 4, 5], 4))
        teacher.close()


def test_the_cache_does_not_answer_for_other_weights_or_another_k(tmp_path: Any) -> None:
    with StubServer() as first, StubServer(seed=1) as retrained:
        for stub, k in ((first, 2), (first, 3), (retrained, 3)):
            teacher = teacher_of(stub, top_k=k, cache=str(tmp_path))
            assert same(teacher.score([[1, 2]], [[3]])[0], expected(stub, [1, 2], [3], k))
            teacher.close()


def test_a_damaged_cache_entry_is_asked_for_again(tmp_path: Any) -> None:
    with StubServer() as stub:
        teacher = teacher_of(stub, top_k=2, cache=str(tmp_path))
        teacher.score([[1]], [[3]])
        assert teacher._cache is not None
        teacher._cache._database.execute("UPDATE replies SET value = x'0011'")
        assert same(teacher.score([[1]], [[3]])[0], expected(stub, [1], [3], 2))
        teacher.close()


# The check before training.

TOKENIZER = LetterTokenizer()


def test_the_check_passes_and_says_what_was_found() -> None:
    with StubServer() as stub:
        teacher = teacher_of(stub, top_k=5)
        (line,) = teacher.check(TOKENIZER, longest_tokens=255, vocabulary_size=VOCABULARY)
        assert stub.url in line
        assert "256" in line
        assert "5 log-probabilities" in line
        assert teacher.context_tokens == 256
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
        with pytest.raises(
            UserError, match=r"teacher.model=glm4.7.*It serves: glm-4.7.*Did you mean teacher.model=glm-4.7"
        ):
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
        teacher.vocabulary_size = VOCABULARY - 1
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


# Writing.


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
