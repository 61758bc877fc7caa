"""The current policy as a judge: log-probabilities of given tokens, without gradient, never with all logits at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer

from selfdistill.losses.head import finish_
from selfdistill.models.agreement import logits_agree
from selfdistill.models.structure import evaluating, inner_model, scale_and_soft_cap
from selfdistill.rewards.batching import Ids, ScoringBatch, plan
from selfdistill.tokens import encode

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
        model: a transformers causal LM, or a module that takes `input_ids` (B, S) and returns `.logits` (B, S, V).
        tokenizer: gives the EOS id, and encodes answers.
        micro_batch_tokens: padded tokens a forward pass.
        temperature: logits are divided by it, as the trainer does with the sampling temperature.
        most_of_any_process: gives the largest of the processes' numbers, where a pass of the model takes all of them:
            then each makes as many as the others, and all have to ask for scores equally often.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        micro_batch_tokens: int = 16384,
        temperature: float = 1.0,
        most_of_any_process: Callable[[int], int] | None = None,
    ) -> None:
        if micro_batch_tokens < 1:
            raise ValueError(f"micro_batch_tokens is {micro_batch_tokens}, it must be at least 1")
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}, it must be positive")
        self.model = model
        self.tokenizer = tokenizer
        self.micro_batch_tokens = micro_batch_tokens
        self.temperature = temperature
        self._most_of_any_process = most_of_any_process
        inner = inner_model(model)
        self._pretrained: PreTrainedModel | None = inner if isinstance(inner, PreTrainedModel) else None
        # What `_look_at_model` finds out before the first row: the head, where it may be called apart.
        self._looked = False
        self._head: nn.Module | None = None
        self._shares_prompts = False

    @property
    def eos_ids(self) -> set[int]:
        """Every id that ends a completion: the tokenizer's, and those the model's generation stops at."""
        stops = None if self._pretrained is None else self._pretrained.generation_config.eos_token_id
        found = [self.tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])]
        return {eos for eos in found if eos is not None}

    @property
    def vocabulary_size(self) -> int:
        return getattr(self._text_config, "vocab_size", None) or len(self.tokenizer)

    @property
    def _text_config(self) -> PretrainedConfig | None:
        """The part of the model's configuration that is about text; None where there is none."""
        return None if self._pretrained is None else self._pretrained.config.get_text_config()

    def encode(self, text: str) -> list[int]:
        """Ids of a text by itself; what it spells like a special token stays text."""
        return encode(self.tokenizer, text)

    def without_eos(self, ids: Sequence[int]) -> list[int]:
        """The ids without a closing EOS."""
        return list(ids[:-1]) if ids and ids[-1] in self.eos_ids else list(ids)

    def token_logprobs(
        self, prompt_ids: Ids, completion_ids: Ids, target_ids: Ids | None = None
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
        targets = completion_ids if target_ids is None else target_ids
        return [row[0] for row in self._score(prompt_ids, completion_ids, targets, statistics=False)]

    def token_statistics(self, prompt_ids: Ids, completion_ids: Ids) -> TokenStatistics:
        """Log-probability, entropy and self-certainty at every completion token, in one pass."""
        rows = self._score(prompt_ids, completion_ids, completion_ids, statistics=True)
        return TokenStatistics(*([row[kind] for row in rows] for kind in range(3)))

    def _score(
        self, prompt_ids: Ids, completion_ids: Ids, targets: Ids, *, statistics: bool
    ) -> list[Float[Tensor, "K _T"]]:
        """The values of each row's targets: their log-probabilities and, with `statistics`, the other two kinds."""
        if not len(prompt_ids) == len(completion_ids) == len(targets):
            raise ValueError(f"{len(prompt_ids)} prompts, {len(completion_ids)} completions and {len(targets)} targets")
        for row, (prompt, completion, target) in enumerate(zip(prompt_ids, completion_ids, targets, strict=True)):
            if target and not prompt:
                raise ValueError(f"row {row} has an empty prompt: nothing predicts its first token")
            if len(target) > len(completion):
                raise ValueError(f"row {row} has {len(target)} targets for {len(completion)} completion tokens")

        counts = [len(target) for target in targets]
        found = [torch.empty(3 if statistics else 1, 0, device=self._device)] * len(targets)
        with evaluating(self.model):
            if not self._looked and (any(targets) or self._most_of_any_process):
                self._look_at_model(next((prompt[0] for prompt in prompt_ids if prompt), 0))
            batches = plan(prompt_ids, counts, self.micro_batch_tokens, self._shared_budget_tokens())
            self._pass_with_the_others(sum(1 if batch.prompts is None else 2 for batch in batches))
            for batch in batches:
                call, predicting = self._call(batch, prompt_ids, completion_ids, counts)
                wanted = torch.tensor([token for row in batch.rows for token in targets[row]], device=self._device)
                values = self._forward(call, predicting, wanted, statistics)
                for row, part in zip(batch.rows, values.split([counts[row] for row in batch.rows], dim=1), strict=True):
                    found[row] = part
        return found

    def _pass_with_the_others(self, passes: int) -> None:
        """Makes as many passes of one token as this process has fewer than another one."""
        if self._most_of_any_process is not None:
            token = torch.zeros(1, 1, dtype=torch.long, device=self._device)
            for _ in range(self._most_of_any_process(passes) - passes):
                self.model(input_ids=token)

    def _call(
        self, batch: ScoringBatch, prompt_ids: Ids, completion_ids: Ids, counts: Sequence[int]
    ) -> tuple[dict[str, Any], Bool[Tensor, "B S"]]:
        """The arguments of one call of the model, and which of its positions predict the targets.

        With shared prompts, their pass has been made, and a row begins with the last token of its prompt. The token
        before a position predicts it, so the last target itself is no input. Padding stands on the right, where a
        causal model never looks.
        """
        prompts = [list(prompt_ids[row]) for row in batch.rows]
        beginnings = prompts if batch.prompts is None else [prompt[-1:] for prompt in prompts]
        inputs, predicting = [], []
        for row, beginning in zip(batch.rows, beginnings, strict=True):
            inputs.append([*beginning, *completion_ids[row][: counts[row] - 1]])
            predicting.append([False] * (len(beginning) - 1) + [True] * counts[row])
        call: dict[str, Any] = {"input_ids": self._padded(inputs)}
        if batch.prompts is not None:
            call |= self._pass_of_prompts([prompt[:-1] for prompt in prompts], batch.prompts, call["input_ids"])
        elif self._pretrained is not None:
            call["use_cache"] = False
        return call, self._padded(predicting)

    def _pass_of_prompts(
        self, prefixes: Sequence[list[int]], places: Sequence[int], following: Int[Tensor, "B S"]
    ) -> dict[str, Any]:
        """One pass of the distinct prompts; the arguments with which each row takes over its prompt's keys and values.

        Args:
            prefixes: the prompt of each row, without its last token.
            places: for each row the number of its prompt among the distinct ones.
            following: the rows' further tokens.
        """
        assert self._head is not None
        distinct = dict(zip(places, prefixes, strict=True))
        rows = [torch.tensor(distinct[place], device=self._device) for place in sorted(distinct)]
        ids = pad_sequence(rows, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        order = (mask.cumsum(-1) - 1).clamp(min=0)
        # Nothing is scored yet: the head gets one token of each prompt.
        with self._head.register_forward_pre_hook(lambda _, arguments: (arguments[0][:, :1],)):
            cache = self.model(input_ids=ids, attention_mask=mask, position_ids=order, use_cache=True).past_key_values
        which = torch.tensor(places, device=self._device)
        cache.reorder_cache(which)
        mask = mask[which]
        return {
            "attention_mask": torch.cat([mask, torch.ones_like(following)], dim=1),
            "position_ids": mask.sum(-1, keepdim=True) + torch.arange(following.size(1), device=self._device),
            "past_key_values": cache,
            "use_cache": True,
        }

    def _shared_budget_tokens(self) -> int | None:
        """Tokens whose keys and values fit into CACHE_AT_ONCE, at most `micro_batch_tokens`; None = don't share."""
        text = self._text_config
        if text is None or not self._shares_prompts:
            return None
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        values = 2 * text.num_hidden_layers * heads * width
        bytes_per_token = values * next(self.model.parameters()).element_size()
        return min(self.micro_batch_tokens, CACHE_AT_ONCE // max(1, bytes_per_token))

    def _forward(
        self, call: dict[str, Any], predicting: Bool[Tensor, "B S"], wanted: Int[Tensor, " N"], statistics: bool
    ) -> Float[Tensor, "K N"]:
        """The values of all targets of one call, row after row."""
        if self._head is None:
            own = self.model(**call).logits[:, -predicting.size(1) :]
            return self._read(own, lambda logits: logits, predicting, wanted, statistics)
        found: list[Tensor] = []

        def score_instead(head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = arguments[0][:, -predicting.size(1) :]  # a learned prompt, as of prompt tuning, stands before
            found.append(self._read(hidden, lambda some: self._logits(head, some), predicting, wanted, statistics))
            return (arguments[0][:1, :1],)

        with self._head.register_forward_pre_hook(score_instead):
            self.model(**call)
        return found[0]

    def _look_at_model(self, token: int) -> None:
        """One call with one token tells what may be done with this model.

        Its head may be called apart if the logits, finished by us, are those that the model returns. Completions may
        share their prompt's pass if all that the model keeps of it are plain keys and values (no state-space layer, no
        sliding window, no learned prompt).
        """
        self._looked = True
        head = None if self._pretrained is None else self._pretrained.get_output_embeddings()
        if head is None:
            return
        found: list[Tensor] = []
        with head.register_forward_pre_hook(lambda _, arguments: found.append(self._logits(head, arguments[0]))):
            output = self.model(input_ids=torch.tensor([[token]], device=self._device), use_cache=True)
        if not found:
            return
        if logits_agree(self.model, found[0][0], output.logits[0]):
            self._head = head
            cache = output.get("past_key_values")
            layers = cache.layers if isinstance(cache, Cache) and cache.get_seq_length() == 1 else []
            self._shares_prompts = bool(layers) and all(type(layer) is DynamicLayer for layer in layers)

    def _logits(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """What the head makes of hidden states, and what some architectures do with it afterwards."""
        logits = head.forward(hidden)  # and not `head()`: the hook that asks for them must not run again
        text = self._text_config
        return logits if text is None else finish_(logits, *scale_and_soft_cap(text))

    def _read(
        self,
        states: Tensor,
        logits_of: Callable[[Tensor], Tensor],
        predicting: Bool[Tensor, "B S"],
        wanted: Int[Tensor, " N"],
        statistics: bool,
    ) -> Float[Tensor, "K N"]:
        """Log-probabilities, with `statistics` also entropy and self-certainty, of logits made a chunk at a time."""
        states = states.flatten(0, 1)
        positions = predicting.flatten().nonzero().squeeze(-1).to(states.device)
        chunk = max(1, LOGITS_AT_ONCE // self.vocabulary_size)
        parts = []
        for where, targets in zip(positions.split(chunk), wanted.split(chunk), strict=True):
            logits = logits_of(states[where])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if self.temperature != 1.0:
                logits = logits / self.temperature
            normaliser = logits.logsumexp(-1)
            values = [logits.gather(-1, targets[:, None].to(logits.device)).squeeze(-1) - normaliser]
            if statistics:
                values.append(normaliser - ((logits - normaliser[:, None]).exp() * logits).sum(-1))
                values.append(normaliser - logits.mean(-1))
            parts.append(torch.stack(values).float())
        return torch.cat(parts, dim=1)

    def _padded(self, rows: Sequence[list[Any]]) -> Tensor:
        """One row per list, padded on the right with 0 or False."""
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def to_lists(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The values of many small tensors as Python floats, with one transfer from the device."""
    if not tensors:
        return []
    flat = torch.cat([tensor.detach() for tensor in tensors]).float().cpu()
    return [part.tolist() for part in flat.split([len(tensor) for tensor in tensors])]
