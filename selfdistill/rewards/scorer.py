"""The current policy as a judge: log-probabilities of given tokens, without gradient, never with all logits at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from selfdistill.losses.head import finish_
from selfdistill.models.structure import evaluating, scale_and_soft_cap
from selfdistill.rewards.batching import plan

# Logits held at any moment: 2^25 float32 are 128 MiB, about 220 tokens of a vocabulary of 152 thousand.
LOGITS_AT_ONCE = 2**25
# Bytes of keys and values held at any moment where completions share their prompt's pass.
CACHE_AT_ONCE = 2**30


@dataclass
class TokenStatistics:
    """One tensor per completion, one value per token, in nats.

    Attributes:
        logprobs: log-probability of the token.
        entropy: entropy of the distribution that the token was drawn from.
        self_certainty: logsumexp(z) − mean(z), which is KL(uniform ‖ p) + ln V (Intuitor, arXiv 2505.19590, eq. 4).
    """

    logprobs: list[Float[Tensor, " _T"]]
    entropy: list[Float[Tensor, " _T"]]
    self_certainty: list[Float[Tensor, " _T"]]


class PolicyScorer:
    """Scores tokens under a causal language model, PEFT-wrapped or not, in evaluation mode and without gradient.

    Rows are sorted by length, in micro-batches of at most `micro_batch_tokens` padded tokens. Where completions share
    prompts and it saves enough, each prompt goes through once and its completions take over its keys and values. The
    head runs on completion positions alone, a chunk at a time, inside the model's own forward pass, so that autocast,
    adapters and sharding apply as they do in training.

    Args:
        model: a transformers causal LM, or a callable that takes `input_ids` (B, S) and returns `.logits` (B, S, V).
        tokenizer: gives the EOS id, and encodes answers.
        micro_batch_tokens: padded tokens a forward pass.
        temperature: logits are divided by it, as the trainer does with the sampling temperature.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, micro_batch_tokens: int = 16384, temperature: float = 1.0
    ) -> None:
        if micro_batch_tokens < 1:
            raise ValueError(f"micro_batch_tokens is {micro_batch_tokens}, it must be at least 1")
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}, it must be positive")
        self.model = model
        self.tokenizer = tokenizer
        self.micro_batch_tokens = micro_batch_tokens
        self.temperature = temperature
        self._head_verified: bool | None = None
        self._shares_prompts = False

    @property
    def eos_ids(self) -> set[int]:
        """Every id that ends a completion: the tokenizer's, and those the model's generation stops at."""
        stops = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        found = [getattr(self.tokenizer, "eos_token_id", None), *(stops if isinstance(stops, list) else [stops])]
        return {eos for eos in found if eos is not None}

    @property
    def vocabulary_size(self) -> int:
        return getattr(self._text_config(), "vocab_size", None) or len(self.tokenizer)

    def _text_config(self) -> Any:
        """The part of the model's configuration that is about text; None where there is none."""
        find = getattr(getattr(self.model, "config", None), "get_text_config", None)
        return find() if find else None

    def encode(self, text: str) -> list[int]:
        """Ids of a text without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_prompts(self, prompts: Sequence[Any]) -> list[list[int]]:
        """Ids of prompts as TRL encodes them: messages by the chat template, strings as text."""
        encoded = []
        for prompt in prompts:
            if isinstance(prompt, str):
                encoded.append(list(self.tokenizer(prompt)["input_ids"]))
            else:
                text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
                encoded.append(self.encode(text))
        return encoded

    def encode_completions(self, completions: Sequence[Any]) -> list[list[int]]:
        """Ids of completions given as text or messages. Sampled ids, where they are at hand, are to be preferred."""
        return [self.encode(c if isinstance(c, str) else c[-1]["content"]) for c in completions]

    def without_eos(self, ids: Sequence[int]) -> list[int]:
        """The ids without a closing EOS."""
        return list(ids[:-1]) if ids and ids[-1] in self.eos_ids else list(ids)

    def token_logprobs(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        target_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[Float[Tensor, " _T"]]:
        """log π(target_t | prompt, completion_<t) for every row, float32 on the model's device.

        Args:
            prompt_ids: what the policy saw, one list of ids per row, at least one id each.
            completion_ids: what follows it.
            target_ids: the tokens to score at the completion's positions, at most as many as the completion has;
                without them the completion's own.

        Raises:
            ValueError: an empty prompt, more targets than completion tokens, lists of different lengths.
        """
        return self._score(prompt_ids, completion_ids, target_ids, statistics=False).logprobs

    def token_statistics(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> TokenStatistics:
        """Log-probability, entropy and self-certainty at every completion token, in one pass."""
        return self._score(prompt_ids, completion_ids, None, statistics=True)

    @torch.no_grad()
    def _score(
        self,
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        target_ids: Sequence[Sequence[int]] | None,
        statistics: bool,
    ) -> TokenStatistics:
        targets = completion_ids if target_ids is None else target_ids
        if not len(prompt_ids) == len(completion_ids) == len(targets):
            raise ValueError(f"{len(prompt_ids)} prompts, {len(completion_ids)} completions and {len(targets)} targets")
        for row, (prompt, completion, target) in enumerate(zip(prompt_ids, completion_ids, targets, strict=True)):
            if target and not prompt:
                raise ValueError(f"row {row} has an empty prompt: nothing predicts its first token")
            if len(target) > len(completion):
                raise ValueError(f"row {row} has {len(target)} targets for {len(completion)} completion tokens")

        counts = [len(target) for target in targets]
        # The token before a position predicts it, so the last scored token itself is not needed as input.
        contexts = [list(c[: max(n - 1, 0)]) for c, n in zip(completion_ids, counts, strict=True)]
        empty = torch.empty(0, device=self._device())
        rows = [(empty, empty, empty)] * len(targets)
        with evaluating(self.model):
            if self._head_verified is None and any(targets):
                self._look_at_model(next(p[0] for p in prompt_ids if p))
            for batch in plan(prompt_ids, counts, self.micro_batch_tokens, self._shared_budget_tokens()):
                prompts = [list(prompt_ids[row]) for row in batch.rows]
                suffixes = [contexts[row] for row in batch.rows]
                wanted = [token for row in batch.rows for token in targets[row]]
                if batch.prompts is None:
                    call, positions = self._whole_rows(prompts, suffixes)
                else:
                    call, positions = self._after_shared_prompts(prompts, suffixes, batch.prompts)
                values = self._forward(call, positions, torch.tensor(wanted, device=self._device()), statistics)
                lengths = [counts[row] for row in batch.rows]
                for row, *parts in zip(batch.rows, *(v.split(lengths) for v in values), strict=True):
                    rows[row] = (parts[0], parts[1], parts[2])
        logprobs, entropy, certainty = zip(*rows, strict=True) if rows else ((), (), ())
        return TokenStatistics(list(logprobs), list(entropy), list(certainty))

    def _whole_rows(self, prompts: list[list[int]], contexts: list[list[int]]) -> tuple[dict[str, Any], list[int]]:
        """Arguments of one call with every row from its beginning, and the flat positions that predict the targets.

        Padding stands on the right, where a causal model never looks.
        """
        inputs = [[*prompt, *context] for prompt, context in zip(prompts, contexts, strict=True)]
        width = max(map(len, inputs))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in inputs], device=self._device())
        positions = [
            index * width + place
            for index, (prompt, row) in enumerate(zip(prompts, inputs, strict=True))
            for place in range(len(prompt) - 1, len(row))
        ]
        return {"input_ids": ids, "use_cache": False} if self._is_pretrained() else {"input_ids": ids}, positions

    def _after_shared_prompts(
        self, prompts: list[list[int]], contexts: list[list[int]], places: list[int]
    ) -> tuple[dict[str, Any], list[int]]:
        """The same after one pass of the distinct prompts, whose keys and values every row of the prompt takes over.

        Prompts are padded on the left and completions on the right, as in generation.
        """
        device = self._device()
        distinct = dict(zip(places, (prompt[:-1] for prompt in prompts), strict=True))
        prefixes = [distinct[place] for place in range(len(distinct))]
        width = max(map(len, prefixes))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in prefixes], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prefixes], device=device)
        order = (mask.cumsum(-1) - 1).clamp(min=0)
        call = {"input_ids": ids, "attention_mask": mask, "position_ids": order, "use_cache": True}
        # Nothing is scored yet: the head gets one token of each prompt.
        cache = self._with_head_hook(lambda _, arguments: (arguments[0][:, :1],), call).past_key_values
        which = torch.tensor(places, device=device)
        cache.reorder_cache(which)

        suffixes = [[prompt[-1], *context] for prompt, context in zip(prompts, contexts, strict=True)]
        longest = max(map(len, suffixes))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in suffixes], device=device)
        mask = mask[which]
        call = {
            "input_ids": ids,
            "attention_mask": torch.cat([mask, torch.ones_like(ids)], dim=1),
            "position_ids": mask.sum(-1, keepdim=True) + torch.arange(longest, device=device),
            "past_key_values": cache,
            "use_cache": True,
        }
        return call, [index * longest + place for index, row in enumerate(suffixes) for place in range(len(row))]

    def _shared_budget_tokens(self) -> int | None:
        """Tokens whose keys and values fit into CACHE_AT_ONCE, at most `micro_batch_tokens`; None = don't share."""
        text = self._text_config()
        if not (self._shares_prompts and self._head_verified):
            return None
        heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", 0)
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        values = 2 * text.num_hidden_layers * heads * width
        bytes_per_token = values * next(self.model.parameters()).element_size()
        return min(self.micro_batch_tokens, CACHE_AT_ONCE // max(1, bytes_per_token))

    def _forward(
        self, call: dict[str, Any], positions: list[int], wanted: Int[Tensor, " N"], statistics: bool
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Statistics of all targets of one micro-batch, flat, row after row."""
        where = torch.tensor(positions, device=self._device())
        if not self._head_verified:
            logits = self.model(**call).logits
            flat = logits.reshape(-1, logits.shape[-1])
            return self._read(lambda rows: flat[where[rows]], wanted, statistics)
        found: list[Tensor] = []

        def score_instead(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = arguments[0]
            if hidden.shape[:-1] != call["input_ids"].shape:
                raise ValueError("the model adds tokens of its own (a learned prompt): positions can't be told apart")
            needed = hidden.reshape(-1, hidden.shape[-1])[where.to(hidden.device)]
            # `module.forward` and not `module()`: this very hook must not run again.
            found.extend(self._read(lambda rows: self._finish(module.forward(needed[rows])), wanted, statistics))
            return (hidden[:1, :1],)

        self._with_head_hook(score_instead, call)
        return found[0], found[1], found[2]

    def _look_at_model(self, token: int) -> None:
        """One call with one token tells what may be done with this model.

        Its head may be called apart if the logits, finished by us, are those that the model returns. Completions may
        share their prompt's pass if all that the model keeps of it are plain keys and values (no state-space layer, no
        sliding window).
        """
        self._head_verified = self._shares_prompts = False
        if self._head() is None:
            return
        found: list[Tensor] = []

        def look(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found.append(self._finish(module.forward(arguments[0])))

        ids = torch.tensor([[token]], device=self._device())
        call = {"input_ids": ids, "use_cache": True} if self._is_pretrained() else {"input_ids": ids}
        output = self._with_head_hook(look, call)
        if found and found[0].shape == output.logits.shape:
            ours, theirs = found[0].float(), output.logits.float()
            self._head_verified = torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2)
        layers = getattr(getattr(output, "past_key_values", None), "layers", [])
        self._shares_prompts = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)

    def _with_head_hook(self, hook: Callable[..., Any], call: dict[str, Any]) -> Any:
        """The model's output for a call, with a hook in front of its head meanwhile."""
        head = self._head()
        assert head is not None
        handle = head.register_forward_pre_hook(hook)
        try:
            return self.model(**call)
        finally:
            handle.remove()

    def _read(
        self, logits_of: Any, targets: Int[Tensor, " N"], statistics: bool
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"], Float[Tensor, " N"]]:
        """Log-probabilities, and where asked entropy and self-certainty, from logits that come a chunk at a time."""
        chunk = max(1, LOGITS_AT_ONCE // self.vocabulary_size)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            logits = logits_of(rows)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if self.temperature != 1.0:
                logits = logits / self.temperature
            normaliser = logits.logsumexp(-1)
            logprobs = logits.gather(-1, targets[rows, None].to(logits.device)).squeeze(-1) - normaliser
            entropy = certainty = logprobs
            if statistics:
                entropy = normaliser - ((logits - normaliser[:, None]).exp() * logits).sum(-1)
                certainty = normaliser - logits.mean(-1)
            parts.append((logprobs.float(), entropy.float(), certainty.float()))
        logprobs, entropy, certainty = (torch.cat(part) for part in zip(*parts, strict=True))
        return logprobs, entropy, certainty

    def _is_pretrained(self) -> bool:
        return isinstance(self.model, nn.Module) and self._text_config() is not None

    def _head(self) -> nn.Module | None:
        find = getattr(self.model, "get_output_embeddings", None)
        head = find() if find else None
        return head if isinstance(head, nn.Module) else None

    def _finish(self, logits: Tensor) -> Tensor:
        """What some architectures do with the head's products."""
        text = self._text_config()
        return logits if text is None else finish_(logits, *scale_and_soft_cap(text))

    def _device(self) -> torch.device:
        if (device := getattr(self.model, "device", None)) is not None:
            return torch.device(device)
        parameter = next(self.model.parameters(), None) if isinstance(self.model, nn.Module) else None
        return torch.device("cpu") if parameter is None else parameter.device


def to_lists(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The values of many small tensors as Python floats, with one transfer from the device."""
    if not tensors:
        return []
    flat = torch.cat([tensor.detach() for tensor in tensors]).float().tolist()
    result, start = [], 0
    for tensor in tensors:
        result.append(flat[start : start + len(tensor)])
        start += len(tensor)
    return result
