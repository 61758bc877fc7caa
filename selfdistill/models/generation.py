"""Answers of a model and the logits behind them; its mode, its settings and the random state stay as they were."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from selfdistill.models.structure import evaluating, inner_model, limited_logits
from selfdistill.rollout import Prompt


def tokenize(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a prompt: messages through the chat template up to where the assistant speaks, a string as it is."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    options = {"add_generation_prompt": True, "return_dict": False, **(chat_template_kwargs or {})}
    return cast(list[int], tokenizer.apply_chat_template(prompt, tokenize=True, **options))


def generate(
    model: torch.nn.Module,
    prompt_ids: Sequence[list[int]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    batch_size: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[int]]:
    """Completions as token ids, in the order of the prompts, the end token included where it was emitted.

    Prompts are padded on the left and grouped by length. Neither the model's own generation settings (top-p,
    repetition penalty, …) nor its `use_cache` take part: temperature 0 is the plain argmax.

    Raises:
        ValueError: a prompt without tokens.
    """
    if any(not ids for ids in prompt_ids):
        raise ValueError("a prompt has no tokens")
    base = inner_model(model)
    end_ids = _end_ids(base, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(end_ids, default=0)
    special = {"eos_token_id": sorted(end_ids) or None, "pad_token_id": pad_id, "bos_token_id": tokenizer.bos_token_id}
    settings = GenerationConfig(max_new_tokens=max_new_tokens, use_cache=True, do_sample=temperature > 0, **special)
    if temperature > 0:
        settings.update(temperature=temperature, top_k=0, top_p=1.0)
    device = base.get_input_embeddings().weight.device
    completions: list[list[int]] = [[] for _ in prompt_ids]
    order = sorted(range(len(prompt_ids)), key=lambda index: len(prompt_ids[index]), reverse=True)
    with evaluating(model), _generation_config(base, GenerationConfig(**special)), _seeded(seed, device):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            input_ids, attention_mask = pad_left([prompt_ids[index] for index in rows], pad_id, device)
            output = base.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=settings)
            for index, ids in zip(rows, output[:, input_ids.shape[1] :].tolist(), strict=True):
                completions[index] = _until_end(ids, end_ids)
    return completions


def pad_left(
    sequences: Sequence[list[int]], pad_id: int, device: torch.device
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Token ids and attention mask of sequences that end together."""
    width = max(len(ids) for ids in sequences)
    ids = torch.tensor([[pad_id] * (width - len(ids)) + list(ids) for ids in sequences], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in sequences], device=device)
    return ids, mask


def _end_ids(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ends = base.generation_config.eos_token_id
    ids = set(ends) if isinstance(ends, list | tuple) else {ends}
    return {token for token in ids | {tokenizer.eos_token_id} if token is not None}


def _until_end(ids: list[int], end_ids: set[int]) -> list[int]:
    for position, token in enumerate(ids):
        if token in end_ids:
            return ids[: position + 1]
    return ids


@contextmanager
def _generation_config(base: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    # transformers fills what a call leaves open from the model's own generation config, so it has to go meanwhile.
    own = base.generation_config
    base.generation_config = config
    try:
        yield
    finally:
        base.generation_config = own


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def completion_logits(model: torch.nn.Module, prompt_ids: list[int], completion_ids: list[int]) -> Float[Tensor, "T V"]:
    """The float32 logits (T, V) from which each completion token was drawn. The caller sets mode and gradient."""
    base = inner_model(model)
    device = base.get_input_embeddings().weight.device
    ids = torch.tensor([prompt_ids + completion_ids], device=device)
    kept = len(completion_ids) + 1
    return base(input_ids=ids, use_cache=False, **limited_logits(base, kept)).logits[0, -kept:-1].float()
