"""Served teachers for the tests, rows for them to score, and what the stub's model says of these."""

import random
from typing import Any

import torch

from selfdistill.losses import TopTokens
from selfdistill.teachers.server import ServerTeacher
from tests.teachers.server.stub_server import VOCABULARY, StubServer

Rows = list[list[int]]

# Closed after each test by conftest.py.
OPEN: list[ServerTeacher] = []


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


def expected(stub: StubServer, prompt: list[int], completion: list[int], k: int) -> TopTokens:
    """The stub's model, applied here."""
    table = torch.tensor(stub.table, dtype=torch.float64)
    before = torch.tensor([prompt[-1], *completion], dtype=torch.long)[: len(completion)]
    logprobs = table[before].reshape(len(completion), VOCABULARY)
    top = logprobs.topk(k, dim=-1)
    own = logprobs.gather(1, torch.tensor(completion, dtype=torch.long).reshape(-1, 1)).squeeze(1)
    return TopTokens(own.float(), top.indices, top.values.float())


def same(scored: TopTokens, wanted: TopTokens) -> bool:
    return (
        torch.allclose(scored.sampled_logps, wanted.sampled_logps, atol=1e-6)
        and scored.ids.shape == wanted.ids.shape
        and torch.equal(scored.ids, wanted.ids)
        and torch.allclose(scored.logps, wanted.logps, atol=1e-6)
    )
