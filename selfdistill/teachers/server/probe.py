"""What a server can do, found by asking it: its models, its limits, its tokenizer.

It is asked before training, so that an unfit server is a message and not a crash an hour later, and by the doctor.
All coroutines run on the client's event loop.
"""

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

from selfdistill.config.suggestions import guess
from selfdistill.errors import UserError
from selfdistill.rollout import Message
from selfdistill.teachers.language import ANSWERED, QUESTION, Speaker, asked_alike, ends_alike
from selfdistill.teachers.server.client import (
    Client,
    MalformedReply,
    ReplyError,
    RequestRefused,
    ServerUnavailable,
    all_of,
    part,
)
from selfdistill.teachers.server.prompt_logprobs import TokenRow, TopKRefused, choices_of, score_rows

T = TypeVar("T")

# Low ids exist in every vocabulary. The same row for every model, so that a model is recognised by its answer.
PROBE = TokenRow(list(range(5, 37)), 1)
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


def _read_models(reply: Any) -> dict[str, ServedModel]:
    models = {}
    for entry in part(reply, "data", list):
        name, root, length = part(entry, "id", str), entry.get("root"), entry.get("max_model_len")
        models[name] = ServedModel(
            name, root if isinstance(root, str) else None, length if isinstance(length, int) else None
        )
    return models


async def find_model(client: Client, name: str) -> ServedModel:
    """The served model of that name.

    Raises:
        UserError: it is not served; the message lists what is.
        ServerUnavailable, RequestRefused, MalformedReply: as `Client.request`.
    """
    models = await client.request("GET", "models", decode=_read_models)
    if name not in models:
        raise UserError(
            f"{client.key_prefix}model={name}: {client.name} does not serve it. "
            f"It serves {', '.join(models) or 'nothing'}{guess(name, models)}"
        )
    return models[name]


async def require_scoring(client: Client, model: str, k: int) -> list[float]:
    """Log-probabilities of the probe row, asked for together with the k likeliest tokens.

    Raises:
        UserError: the server gives no prompt log-probabilities, or fewer than k a position.
    """
    try:
        (answer,) = await score_rows(client, model, [PROBE], k)
    except (RequestRefused, MalformedReply) as error:
        raise UserError(
            f"{error}\n{client.name} cannot score: it gives no prompt_logprobs of token ids. A vLLM server does; "
            f"with any other use {client.key_prefix}mode=write, in which the server writes demonstrations."
        ) from None
    return answer.sampled_logps.tolist()


async def largest_k(client: Client, model: str, vocabulary: int) -> int:
    """The most log-probabilities a position that the server gives, at most the size of the vocabulary.

    More than the vocabulary is never asked for: a server that allows it can crash.

    Raises:
        RequestRefused: the server refuses the whole vocabulary and names no limit.
    """
    try:
        await score_rows(client, model, [TokenRow(PROBE.ids[:2], 1)], vocabulary)
    except TopKRefused as refusal:
        return refusal.limit
    return vocabulary


def require_context(client: Client, model: str, context_tokens: int, longest_tokens: int) -> None:
    """Raises UserError where teacher prompt and completion of so many tokens together do not fit into the context."""
    # The server generates at least one token after what it scores.
    if longest_tokens >= context_tokens:
        raise UserError(
            f"{client.name} serves {model} with a context of {context_tokens} tokens; the teacher's prompt and a "
            f"completion can take {longest_tokens}, and one more is needed. Start it with --max-model-len "
            f"{longest_tokens + 1}, or shorten the completions (rollout.max_completion_tokens) or what the teacher is "
            "shown."
        )


async def require_tokenizer(client: Client, model: str, tokenizer: Tokenizer) -> None:
    """Raises UserError where the server's tokenizer is not this one; the message shows differences."""
    differences = await tokenizer_differences(client, model, tokenizer)
    if differences:
        raise UserError(
            f"{client.name} serves {model} with another tokenizer than the student's: {'; '.join(differences)}.\n"
            f"Token-level distillation needs the same one. {client.key_prefix}mode=write needs no common tokenizer: "
            "the server then writes demonstrations as text."
        )


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
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    try:
        return await client.request("POST", "/tokenize", body, partial(_ids, "tokens"))
    except RequestRefused as error:
        if error.status not in (404, 405):
            raise
    body |= {"max_tokens": 1, "return_token_ids": True}
    return await client.request(
        "POST", "completions", body, lambda reply: _ids("prompt_token_ids", choices_of(reply, 1)[0])
    )


async def compare(client: Client, model: str, student: Speaker, template_kwargs: Mapping[str, Any]) -> list[str]:
    """How the served model is asked and ends otherwise than the student, as far as the server says.

    vLLM's /tokenize renders messages with the server's own chat template, and /tokenizer_info, where it is switched on,
    names the end of sequence. What a server does not answer is not compared.

    Args:
        template_kwargs: what the chat template is rendered with for the teacher.

    Raises:
        UserError: the two have no end in common.
    """
    key = f"{client.key_prefix}model={model}"
    ends = await _end_of_sequence(client, student)
    if not student.conversational:
        return ends_alike(student, ends, None, key)
    asked = await _encode_chat(client, model, QUESTION, template_kwargs, add_generation_prompt=True)
    answered = await _encode_chat(client, model, ANSWERED, template_kwargs, add_generation_prompt=False)
    instead = (
        f"{key} is asked in the student's chat template, while the server's own writes otherwise: write "
        "data.chat_template=FILE with the server's, for both, if its answers should follow that."
    )
    asked_here = replace(student, template_kwargs=template_kwargs)
    found = [] if asked is None else asked_alike(asked_here, asked, instead)
    turn = None if answered is None else student.turn_in(answered)
    if turn is None:
        return found
    # Without its end of sequence it may stop at the student's: then the difference is said, and nothing refused.
    return found + ends_alike(student, [turn, *(ends or student.plain_ends)], turn, key)


async def _encode_chat(
    client: Client, model: str, messages: list[Message], template_kwargs: Mapping[str, Any], **options: Any
) -> list[int] | None:
    """The server's token ids of messages; None where it does not say."""
    body = {"model": model, "messages": messages, "chat_template_kwargs": dict(template_kwargs), **options}
    return await _where_told(client.request("POST", "/tokenize", body, partial(_ids, "tokens")))


async def _end_of_sequence(client: Client, student: Speaker) -> list[int]:
    """The id of the server's end of sequence, where it tells its name; the tokenizer is known to be the student's."""
    told: Any = await _where_told(client.request("GET", "/tokenizer_info"))
    name = told.get("eos_token") if isinstance(told, dict) else None
    name = name.get("content") if isinstance(name, dict) else name
    found = student.tokenizer.get_vocab().get(name) if isinstance(name, str) else None
    return [] if found is None else [found]


async def _where_told(request: Awaitable[T]) -> T | None:
    try:
        return await request
    except (RequestRefused, MalformedReply, ServerUnavailable):
        return None


def _ids(name: str, reply: Any) -> list[int]:
    ids = part(reply, name, list)
    if not all(isinstance(token, int) for token in ids):
        raise ReplyError(f"{name} is not a list of token ids")
    return ids


async def _vocabulary_differences(client: Client, model: str, tokenizer: Tokenizer) -> list[str]:
    size = len(tokenizer)

    async def detokenize(ids: list[int]) -> str:
        body = {"model": model, "tokens": ids}
        return await client.request("POST", "/detokenize", body, lambda reply: part(reply, "prompt", str))

    async def differing(ids: list[int], enough: list[int]) -> None:
        """Find, by halving, the ids that differ alone: the texts of several may differ only in the spaces between."""
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
