"""A served teacher that scores, against a stub whose every log-probability is known, and which fails on request."""

import copy
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from trl.trainer.utils import pad

from selfdistill.losses import TopTokens
from selfdistill.teachers.interface import TeacherRequest
from selfdistill.teachers.server import ServerTeacher
from selfdistill.teachers.server.client import MalformedReply, ServerUnavailable
from tests.teachers.server.served import Rows, expected, random_rows, same, teacher_of
from tests.teachers.server.stub_server import VOCABULARY, Reply, Request, StubServer


@pytest.mark.parametrize("top_k", [0, 1, 5, VOCABULARY - 1, VOCABULARY, None])
def test_scores_are_the_models_whatever_k(top_k: int | None) -> None:
    prompts, completions = random_rows(30)
    completions[3] = []
    k = VOCABULARY if top_k is None else top_k
    with StubServer() as stub:
        teacher = teacher_of(stub, top_k=top_k)
        for prompt, completion, scored in zip(prompts, completions, teacher.score(prompts, completions), strict=True):
            assert scored.sampled_logps.shape == (len(completion),)
            if completion:
                assert same(scored, expected(stub, prompt, completion, k))
            else:
                assert scored.ids.shape == (0, top_k or 0)
        teacher.close()


def test_only_empty_completions_ask_nothing() -> None:
    with StubServer() as stub:
        teacher = teacher_of(stub, top_k=3)
        assert [len(scored.sampled_logps) for scored in teacher.score([[1], [2, 3]], [[], []])] == [0, 0]
        assert teacher.score([], []) == []
        assert stub.requests == []
        teacher.close()


def test_minus_infinity_arrives_as_minus_infinity() -> None:
    with StubServer() as stub:
        stub.table[1] = [0.0] + [float("-inf")] * (VOCABULARY - 1)
        teacher = teacher_of(stub, top_k=3)
        scored = teacher.score([[1]], [[7]])[0]
        assert scored.sampled_logps.tolist() == [float("-inf")]
        assert scored.logps.tolist() == [[0.0, float("-inf"), float("-inf")]]
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


def request_of(prompts: list[list[int]], completions: list[list[int]], keep: list[list[bool]]) -> TeacherRequest:
    """Padded as the trainer pads."""

    def padded(rows: list, side: str) -> torch.Tensor:
        return pad([torch.tensor(row) for row in rows], 0, padding_side=side)

    return TeacherRequest(
        padded(prompts, "left"),
        padded([[1] * len(row) for row in prompts], "left"),
        padded(completions, "right"),
        padded([[1] * len(row) for row in completions], "right"),
        padded(keep, "right").bool(),
    )


def test_a_request_carries_its_answer_and_is_sent_once() -> None:
    """The later request is under way before anything is read, and its answer is right where the request is a copy."""
    rows = [([[1, 2], [3]], [[5, 6, 7], [8, 9]]), ([[4]], [[10, 11]])]
    keeps = [[[True, False, True], [False, True]], [[True, True]]]
    with StubServer() as stub, teacher_of(stub, top_k=3, max_concurrency=1) as teacher:
        requests = [request_of(*ids, keep) for ids, keep in zip(rows, keeps, strict=True)]
        teacher.prepare(requests)
        teacher.prepare(requests)
        assert all(request.answer is not None for request in requests)
        for request in (requests[1], copy.copy(requests[0])):
            wanted = [expected(stub, prompt, completion, 3) for prompt, completion in request.sent()]
            said = teacher.say(request, nn.Identity())
            assert same(said, TopTokens.concatenated(wanted, list(request.keep)))
            assert len(said.sampled_logps) == (3 if len(wanted) == 2 else 2)
        assert [len(request.body["prompt"]) for request in stub.asked("completions")] == [2, 1]


def test_what_was_not_prepared_is_asked_when_it_is_needed() -> None:
    with StubServer() as stub, teacher_of(stub, top_k=3) as teacher:
        said = teacher.say(request_of([[1]], [[2, 3]], [[True, True]]), nn.Identity())
        assert same(said, expected(stub, [1], [2, 3], 3))


def test_rows_without_a_distilled_token_are_not_sent() -> None:
    with StubServer() as stub, teacher_of(stub, top_k=3) as teacher:
        request = request_of([[1], [2]], [[2, 3], [4]], [[False, False], [True]])
        assert same(teacher.say(request, nn.Identity()), expected(stub, [2], [4], 3))
        assert [request.body["prompt"] for request in stub.asked("completions")] == [[[2, 4]]]


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
        with pytest.raises(MalformedReply, match=r"completions that cannot be used.*not JSON"):
            teacher.score(*ROWS)
        teacher.close()


@pytest.mark.long
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


def test_requests_that_begin_together_open_the_cache_once(tmp_path: Any) -> None:
    with StubServer(latency_s=0.02) as stub, teacher_of(stub, top_k=2, cache=str(tmp_path)) as teacher:
        for future in [teacher.score_async([[1, 2]], [[token]]) for token in range(8)]:
            future.result(timeout=30)
        assert len(stub.asked("models")) == 1
        assert len(stub.asked("completions")) == 1 + 8, "one probe, and each row"


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
        assert teacher.scorer.cache is not None
        teacher.scorer.cache._database.execute("UPDATE replies SET value = x'0011'")
        assert same(teacher.score([[1]], [[3]])[0], expected(stub, [1], [3], 2))
        teacher.close()
