"""A model's answers, and the logits of given completions."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from selfdistill.models.structure import evaluating, inner_model, limited_logits
from selfdistill.rollout import Prompt
from selfdistill.tokens import encode_prompt


def tokenize(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Token ids of a prompt: messages through the chat template up to where the assistant speaks, a string as it is."""
    return encode_prompt(tokenizer, prompt, chat_template_kwargs)


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
    repetition penalty, …) nor its `use_cache` take part: temperature 0 is the plain argmax. The model's mode, its
    settings and the random state are left as they were.

    Raises:
        ValueError: a prompt without tokens.
    """
    if any(not ids for ids in prompt_ids):
        raise ValueError("a prompt has no tokens")
    base = inner_model(model)
    answering: Any = model if isinstance(model, FSDPModule) else base  # FSDP2 gathers what the outermost module owns
    end_ids = _end_ids(base, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(end_ids, default=0)
    special = {"eos_token_id": sorted(end_ids) or None, "pad_token_id": pad_id, "bos_token_id": tokenizer.bos_token_id}
    settings = GenerationConfig(max_new_tokens=max_new_tokens, use_cache=True, do_sample=temperature > 0, **special)
    if temperature > 0:
        settings.update(temperature=temperature, top_k=0, top_p=1.0)
    device = base.get_input_embeddings().weight.device
    completions: list[list[int]] = [[] for _ in prompt_ids]
    order = sorted(range(len(prompt_ids)), key=lambda index: len(prompt_ids[index]), reverse=True)
    random_state = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with evaluating(model), _generation_config(base, GenerationConfig(**special)), random_state:
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            prompts = [torch.tensor(prompt_ids[index], device=device) for index in rows]
            input_ids = pad_sequence(prompts, batch_first=True, padding_value=pad_id, padding_side="left")
            mask = pad_sequence([torch.ones_like(ids) for ids in prompts], batch_first=True, padding_side="left")
            output = answering.generate(input_ids=input_ids, attention_mask=mask, generation_config=settings)
            for index, ids in zip(rows, output[:, input_ids.shape[1] :].tolist(), strict=True):
                length = next((n for n, token in enumerate(ids, start=1) if token in end_ids), len(ids))
                completions[index] = ids[:length]
    return completions


def _end_ids(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ends = base.generation_config.eos_token_id
    ids = set(ends) if isinstance(ends, list | tuple) else {ends}
    return {token for token in ids | {tokenizer.eos_token_id} if token is not None}


@contextmanager
def _generation_config(base: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    # transformers fills what a call leaves open from the model's own generation config, so it has to go meanwhile.
    own = base.generation_config
    base.generation_config = config
    try:
        yield
    finally:
        base.generation_config = own


def completion_logits(model: torch.nn.Module, prompt_ids: list[int], completion_ids: list[int]) -> Float[Tensor, "T V"]:
    """The float32 logits (T, V) from which each completion token was drawn. The caller sets mode and gradient."""
    base = inner_model(model)
    device = base.get_input_embeddings().weight.device
    ids = torch.tensor([prompt_ids + completion_ids], device=device)
    kept = len(completion_ids) + 1
    return base(input_ids=ids, use_cache=False, **limited_logits(base, kept)).logits[0, -kept:-1].float()
