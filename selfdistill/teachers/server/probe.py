"""What a server can do, found by asking it: its models, its limits, its tokenizer.

It is asked before training, so that an unfit server is a message and not a crash an hour later, and by the doctor.
All coroutines run on the client's event loop.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from selfdistill.config.suggestions import guess
from selfdistill.errors import UserError
from selfdistill.losses import TopTokens
from selfdistill.teachers.server.client import Client, MalformedReply, ReplyError, RequestRefused, all_of
from selfdistill.teachers.server.prompt_logprobs import ALL, choices_of, read_positions, scoring_body

# Low ids exist in every vocabulary. The same row for every model, so that a model is recognised by its answer.
PROBE_IDS = tuple(range(5, 37))
# Text in which tokenizers differ: digits, spaces, capitals, accents, other scripts, code, control characters, emoji.
PROBE_TEXT = (
    "The 3 quick brown foxes can't jump 12345.67 times over  the lazy dog's back.\n\tdef f(x): return x**2 != None\n"
    "Überraschung, naïveté, señor; 知識の蒸留 и обучение. 🦊\r\n   <|user|></s><think>{\"a\": [1, 2]}"
)  # fmt: skip
PLAIN_PROBE_TEXT = "the red fox can't jump 12345 times over  the lazy dog's back. f(x): return x**2 != None"
DETOKENIZE_CHUNK = 4096
MOST_DIFFERENCES = 3


@runtime_checkable
class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    def __len__(self) -> int: ...
    def decode(self, token_ids: list[int], /) -> str | list[str]: ...
    def encode(self, text: str, /, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True)
class ServedModel:
    """One entry of a server's list of models.

    Attributes:
        name: what requests call it.
        root: what it was loaded from, where the server says.
        context_tokens: the most tokens of prompt and completion together, where the server says.
    """

    name: str
    root: str | None
    context_tokens: int | None

    @property
    def identity(self) -> str:
        """What the server says that distinguishes the model; independent of the server's address."""
        return f"{self.name}|{self.root}"


async def served_models(client: Client) -> list[ServedModel]:
    """The models a server lists.

    Raises:
        ServerUnavailable, RequestRefused, MalformedReply: as `Client.request`.
    """
    return await client.request("GET", "models", decode=_read_models)


def _read_models(reply: Any) -> list[ServedModel]:
    entries = reply.get("data") if isinstance(reply, dict) else None
    if not isinstance(entries, list) or not all(isinstance(e, dict) and isinstance(e.get("id"), str) for e in entries):
        raise ReplyError("it is not a list of models")
    models = []
    for entry in entries:
        root, length = entry.get("root"), entry.get("max_model_len")
        root, length = root if isinstance(root, str) else None, length if isinstance(length, int) else None
        models.append(ServedModel(entry["id"], root, length))
    return models


async def find_model(client: Client, name: str) -> ServedModel:
    """The served model of that name.

    Raises:
        UserError: it is not served; the message lists what is.
    """
    models = await served_models(client)
    for model in models:
        if model.name == name:
            return model
    names = [model.name for model in models]
    served = ", ".join(names) if names else "nothing"
    raise UserError(
        f"{client.key_prefix}model={name}: {client.name} does not serve it. It serves {served}{guess(name, names)}"
    )


async def score_ids(client: Client, model: str, ids: Sequence[int], k: int) -> TopTokens:
    """What the model says of all tokens of a row but the first."""

    def decode(reply: Any) -> TopTokens:
        return read_positions(choices_of(reply, 1)[0], ids, 1, k)

    return await client.request("POST", "completions", scoring_body(model, [list(ids)], k), decode)


async def require_scoring(client: Client, model: str, k: int) -> list[float]:
    """Log-probabilities of the probe row, asked for together with the k likeliest tokens.

    Raises:
        UserError: the server gives no prompt log-probabilities, or fewer than k a position.
    """
    key = f"{client.key_prefix}top_k"
    try:
        return (await score_ids(client, model, PROBE_IDS, k)).sampled_logps.tolist()
    except RequestRefused as error:
        limit = named_limit(error.detail)
        if limit is not None:
            wish = f"{key}={k}" if k != ALL else f"{key}=null (the whole vocabulary)"
            wanted = k if k != ALL else -1
            raise UserError(
                f"{wish}: {client.name} gives at most {limit} log-probabilities a token. Write {key}={limit} or less, "
                f"or start the server with --max-logprobs {wanted}."
            ) from None
        raise UserError(
            f"{error}\n{client.name} cannot score: it takes no token ids with prompt_logprobs. A vLLM server does; "
            f"with any other use {client.key_prefix}mode=write, in which the server writes demonstrations."
        ) from None
    except MalformedReply as error:
        raise UserError(
            f"{error}\n{client.name} cannot score: vLLM's prompt_logprobs are needed. With another kind of server use "
            f"{client.key_prefix}mode=write, in which it writes demonstrations."
        ) from None


def named_limit(detail: str) -> int | None:
    """The largest number of log-probabilities that a refusal names."""
    found = re.search(r"max(?:imum)? allowed[^0-9]*(\d+)", detail)
    return int(found[1]) if found else None


async def largest_k(client: Client, model: str, vocabulary: int) -> int:
    """The most log-probabilities a position that the server gives, at most the size of the vocabulary.

    More is never asked for: a server that allows it can fall over.
    """
    ids = PROBE_IDS[:2]
    try:
        await score_ids(client, model, ids, vocabulary)
        return vocabulary
    except RequestRefused as error:
        if (limit := named_limit(error.detail)) is not None:
            return limit
    low, high = 0, vocabulary  # low is given, high is refused
    while high - low > 1:
        middle = (low + high) // 2
        try:
            await score_ids(client, model, ids, middle)
            low = middle
        except RequestRefused:
            high = middle
    return low


async def tokenizer_differences(client: Client, model: str, tokenizer: Tokenizer) -> list[str]:
    """How the server's tokenizer differs from this one, a few differences in words; empty when they are the same.

    Every token id is turned to text on both sides, and two texts to token ids. Names are not compared.
    """
    differences = await _encoding_differences(client, model, tokenizer)
    try:
        return differences + await _vocabulary_differences(client, model, tokenizer)
    except RequestRefused:
        return differences  # a server without /detokenize; the texts have been compared


async def _encoding_differences(client: Client, model: str, tokenizer: Tokenizer) -> list[str]:
    differences = []
    for text in (PLAIN_PROBE_TEXT, PROBE_TEXT):
        here = [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]
        there = await _encode(client, model, text)
        if here != there:
            pairs = enumerate(zip(here, there, strict=False))
            at = next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(here), len(there)))
            differences.append(
                f"{text[:30]!r}… becomes {here[at : at + 4]} here and {there[at : at + 4]} there, from token {at} on"
            )
    return differences


async def _encode(client: Client, model: str, text: str) -> list[int]:
    """The server's token ids of a text."""

    def tokens(reply: Any) -> list[int]:
        ids = reply.get("tokens") if isinstance(reply, dict) else None
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise ReplyError("it has no list of tokens")
        return ids

    def echoed(reply: Any) -> list[int]:
        return tokens({"tokens": choices_of(reply, 1)[0].get("prompt_token_ids")})

    body = {"model": model, "prompt": text, "add_special_tokens": False}
    try:
        return await client.request("POST", "/tokenize", body, tokens)
    except RequestRefused as error:
        if error.status not in (404, 405):
            raise
        return await client.request("POST", "completions", {**body, "max_tokens": 1, "return_token_ids": True}, echoed)


async def _vocabulary_differences(client: Client, model: str, tokenizer: Tokenizer) -> list[str]:
    size = len(tokenizer)

    async def detokenize(ids: list[int]) -> str:
        def text(reply: Any) -> str:
            if not isinstance(reply, dict) or not isinstance(reply.get("prompt"), str):
                raise ReplyError("it has no text")
            return reply["prompt"]

        return await client.request("POST", "/detokenize", {"model": model, "tokens": ids}, text)

    async def differing(ids: list[int], enough: list[int]) -> None:
        """Halve down to the ids that differ by themselves; texts of several ids may differ by the joints alone."""
        if len(enough) >= MOST_DIFFERENCES or await detokenize(ids) == tokenizer.decode(ids):
            return
        if len(ids) == 1:
            enough.append(ids[0])
            return
        await differing(ids[: len(ids) // 2], enough)
        await differing(ids[len(ids) // 2 :], enough)

    found: list[int] = []
    await detokenize([0])  # a server without this endpoint refuses here, before many requests are under way
    chunks = [list(range(start, min(start + DETOKENIZE_CHUNK, size))) for start in range(0, size, DETOKENIZE_CHUNK)]
    try:
        await all_of(differing(chunk, found) for chunk in chunks)
    except RequestRefused as error:
        return [f"it does not know all of the {size} token ids there are here: {error.detail}"]
    beyond = await detokenize([size])
    if beyond and not found:
        return [f"token {size} is {beyond!r} there, and here the vocabulary ends before it"]
    return [
        f"token {token} is {tokenizer.decode([token])!r} here and {await detokenize([token])!r} there"
        for token in sorted(found)[:MOST_DIFFERENCES]
    ]
