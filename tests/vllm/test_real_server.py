"""The client, the served teacher and the commands against a real vLLM server."""

import json
import random
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from selfdistill import doctor, generate_data
from selfdistill.config import doors
from selfdistill.data import load_data
from selfdistill.errors import UserError
from selfdistill.losses import TopTokens
from selfdistill.machine.served_teacher import check_server
from selfdistill.teachers.language import Speaker
from selfdistill.teachers.server import ServerTeacher
from tests.command import command, composed
from tests.teachers.server.stub_server import LetterTokenizer
from tests.vllm.conftest import CONTEXT_TOKENS, MODEL, NAME, VllmServer

pytestmark = pytest.mark.timeout(900)
TOLERANCE = 1e-4  # nats
EOS = 2


def mixed_rows(tokenizer: Any, count: int = 100, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions of many lengths: empty, one token, ended by EOS, cut off, and up to the context."""
    rng = random.Random(seed)
    vocabulary = len(tokenizer)

    def row(low: int, high: int) -> list[int]:
        return [rng.randrange(3, vocabulary) for _ in range(rng.randint(low, high))]

    prompts = [row(1, 120) for _ in range(count)]
    completions = [row(0, 120) + ([EOS] if i % 3 == 0 else []) for i in range(count)]
    completions[:3] = [[], [EOS], [5]]
    prompts[3], completions[3] = row(300, 300), row(CONTEXT_TOKENS - 301, CONTEXT_TOKENS - 301)
    return prompts, completions


def local(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Log-probabilities (T, V) from the model in this process."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : len(prompt) + len(completion) - 1].float().log_softmax(-1)


def assert_same(scored: TopTokens, model: Any, prompt: list[int], completion: list[int], k: int) -> None:
    assert scored.sampled_logps.shape == (len(completion),)
    if not completion:
        return
    wanted = local(model, prompt, completion)
    own = wanted.gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
    assert scored.ids.shape == (len(completion), k)
    torch.testing.assert_close(scored.sampled_logps, own, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(scored.logps, wanted.gather(1, scored.ids), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(scored.logps, wanted.topk(k).values, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("top_k", [0, 5, None])
def test_scored_log_probabilities_are_the_local_models(
    server: VllmServer, model: Any, tokenizer: Any, top_k: int | None
) -> None:
    teacher = ServerTeacher(server.url, NAME, top_k=top_k)
    try:
        teacher.check(tokenizer, longest_tokens=CONTEXT_TOKENS - 1, vocabulary_size=model.config.vocab_size)
        prompts, completions = mixed_rows(tokenizer, 100 if top_k is None else 40)
        k = model.config.vocab_size if top_k is None else top_k
        for prompt, completion, scored in zip(prompts, completions, teacher.score(prompts, completions), strict=True):
            assert_same(scored, model, prompt, completion, k)
        assert teacher.client.retries == 0
    finally:
        teacher.close()


def test_the_check_finds_what_is_wrong(server: VllmServer, tokenizer: Any) -> None:
    def refused(message: str, tokenizer: Any = tokenizer, longest_tokens: int | None = None, **settings: Any) -> None:
        teacher = ServerTeacher(server.url, **{"model": NAME, "top_k": 3, **settings})
        try:
            with pytest.raises(UserError, match=message):
                teacher.check(tokenizer, longest_tokens=longest_tokens)
        finally:
            teacher.close()

    vocabulary = len(tokenizer)
    refused(r"It serves embedded", model="embeded")
    refused(rf"at most {vocabulary} log-probabilities", top_k=vocabulary + 1)
    refused(r"another tokenizer", tokenizer=LetterTokenizer())
    refused(rf"context of {CONTEXT_TOKENS} tokens", longest_tokens=CONTEXT_TOKENS)


def test_it_tells_how_it_is_asked_and_ends(server: VllmServer) -> None:
    def findings(template: str | None = None, end: str | None = None, **settings: Any) -> list[str]:
        """Of the server beside a student whose template has `template` for its end of turn."""
        own = AutoTokenizer.from_pretrained(MODEL)
        own.eos_token = end or own.eos_token
        own.chat_template = own.chat_template.replace("<|end|>", template or "<|end|>")
        teacher = ServerTeacher(server.url, NAME, top_k=3, **settings)
        try:
            teacher.check(own)
            return teacher.compare(Speaker(own, None, {}))
        finally:
            teacher.close()

    assert findings() == []
    assert findings(chat_template_kwargs={}) == []
    asked, ends = findings(template="<|user|>")
    assert "the server's own writes otherwise" in asked
    assert "teacher.model=embedded" in asked
    assert "distill/divergence_last" in ends
    with pytest.raises(UserError, match=r"^teacher.model=embedded: the student ends its answers with '<.user.>', the"):
        findings(template="<|user|>", end="<|user|>")


def test_a_row_beyond_the_context_and_an_unknown_token_are_refused_in_the_servers_words(server: VllmServer) -> None:
    teacher = ServerTeacher(server.url, NAME, top_k=1)
    try:
        with pytest.raises(UserError, match=f"maximum context length is {CONTEXT_TOKENS}"):
            teacher.score([[5] * CONTEXT_TOKENS], [[6]])
        with pytest.raises(UserError, match="out of vocabulary"):
            teacher.score([[5]], [[100_000]])
        assert len(teacher.score([[5]], [[6]])[0].sampled_logps) == 1
    finally:
        teacher.close()


def test_the_cache_serves_the_same_numbers(server: VllmServer, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    prompts, completions = mixed_rows(tokenizer, 12, seed=1)
    sent = []
    for _ in range(2):
        teacher = ServerTeacher(server.url, NAME, top_k=4, cache=str(tmp_path))
        for prompt, completion, scored in zip(prompts, completions, teacher.score(prompts, completions), strict=True):
            assert_same(scored, model, prompt, completion, 4)
        sent.append(teacher.client.servers[0].sent)
        teacher.close()
    assert sent[1] == 2, "the second time only the list of models and the probe were to be asked for"


def test_it_writes_demonstrations(server: VllmServer) -> None:
    teacher = ServerTeacher(
        server.url, NAME, mode="write", temperature=0.0, max_tokens=24, chat_template_kwargs={"enable_thinking": False}
    )
    try:
        assert teacher.check()
        system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "shout: wolf"}]
        assert teacher.write(["shout: lamp", system]) == [["LAMP"], ["WOLF"]]
    finally:
        teacher.close()


def test_golden_responses_are_shown_and_followed(server: VllmServer) -> None:
    teacher = ServerTeacher(server.url, NAME, mode="write", temperature=0.0, max_tokens=24, show_golden_response=True)
    try:
        prompts, golden = ["wash the lamp", "paint the door"], [["zelu(lamp)"], ["brio(door)"]]
        written = teacher.write(prompts, golden=golden)
        assert written == golden, "the embedded model follows a demonstration"
    finally:
        teacher.close()


def test_generate_data_end_to_end(server: VllmServer, tokenizer: Any, tmp_path: Path) -> None:
    arguments = [
        f"base_url={server.url}", f"model={NAME}", f"output={tmp_path}", "prompts=embedded:retention",
        "train_samples=20", "eval_samples=5", "temperature=0.3", "max_tokens=24", "samples=2",
        "+keep._target_=selfdistill.rewards.ExactMatch",
    ]  # fmt: skip
    assert command(arguments, tmp_path, generate_data).code == 0
    files = {name: (tmp_path / name).read_bytes() for name in ("train_data.json", "eval_data.json")}
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["train"], report["eval"]) == (20, 5)
    data = load_data(
        path=str(tmp_path / "train_data.json"), eval_path=str(tmp_path / "eval_data.json"), tokenizer=tokenizer
    )
    assert len(data.train) == 20
    assert len(data.eval) == 5
    assert not {str(row["prompt"]) for row in data.train} & {str(row["prompt"]) for row in data.eval}
    for row in data.train:
        assert row["answer"] in row["golden_response"][0]
    assert command(arguments, tmp_path, generate_data).code == 0
    assert files == {name: (tmp_path / name).read_bytes() for name in files}
    assert json.loads((tmp_path / "report.json").read_text())["requests"] == 0, "nothing was to be asked twice"


def test_the_doctor_passes_the_server(server: VllmServer, tokenizer: Any) -> None:
    cfg = composed(doctor.with_server([f"teacher.base_url={server.url}", f"teacher.model={NAME}"]))
    lines = {line.what: line for line in check_server(doors.built(cfg, "teacher"), tokenizer, 100)}
    assert {line.state for line in lines.values()} == {"ok"}, lines
    assert f"at most {len(tokenizer)} a token (all)" in lines["log-probabilities"].found


def test_a_server_killed_in_the_middle_and_brought_back_loses_nothing(
    server: VllmServer, model: Any, tokenizer: Any
) -> None:
    """Last, for the server of the session is the one that dies."""
    prompts, completions = mixed_rows(tokenizer, 60, seed=2)
    teacher = ServerTeacher(server.url, NAME, top_k=5, max_concurrency=2, patience_s=600.0)
    try:
        teacher.score([[5]], [[6]])
        futures: list[Future[list[TopTokens]]] = [
            teacher.score_async([p], [c]) for p, c in zip(prompts, completions, strict=True)
        ]
        while sum(future.done() for future in futures) < 10:
            time.sleep(0.005)
        server.kill()
        done = sum(future.done() for future in futures)
        assert done < len(futures), "all was answered before the server died"
        server.start()
        for prompt, completion, future in zip(prompts, completions, futures, strict=True):
            (scored,) = future.result(timeout=500)
            assert_same(scored, model, prompt, completion, 5)
        assert teacher.client.retries > 0
    finally:
        teacher.close()
