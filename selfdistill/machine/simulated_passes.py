"""What the passes of a model take in memory, found out on tensors without numbers.

torch's fake tensors have a shape, a type and a device, and no data. So a pass of any size through a model of any
architecture takes a second and no memory, from its config.json alone, and the storages that would be alive are counted.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import finalize

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PretrainedConfig
from trl.trainer import utils as trl_utils

from selfdistill.models.structure import inner_model, limited_logits

# What a pass raises is caught; torch logs it with its traceback as well.
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
# Of a weight in nf4 with its scales quantised too: half a byte, and 0.127 bits for the scales.
BYTES_OF_4_BIT = 0.516
# From models of so many layers those of more are extrapolated.
FEW_LAYERS = (2, 3)


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that are made inside and are still alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def know(self, tensor: Tensor) -> None:
        """Does not count a tensor that was there before."""
        self._known[tensor.untyped_storage()] = True

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        finalize(storage, self._forget, size).atexit = False

    def _forget(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class Pass:
    """Bytes of a pass beyond what was there before it.

    Attributes:
        held: after the forward pass, for the backward pass; the result is among it.
        most: the most at any time.
    """

    held: int
    most: int


@dataclass(frozen=True)
class Recipe:
    """How a model is loaded and trained.

    Attributes:
        config: what its config.json says.
        dtype: of its weights.
        autocast: what its products are computed in, where that is something else.
        load_in_4bit: whether the weights of its linear layers are kept in 4 bits.
        adapter: what is trained instead of all its weights.
        gradient_checkpointing: whether a layer's activations are computed again in the backward pass.
    """

    config: PretrainedConfig
    dtype: torch.dtype
    autocast: torch.dtype | None = None
    load_in_4bit: bool = False
    adapter: LoraConfig | None = None
    gradient_checkpointing: bool = False


class SimulatedModel:
    """A model without numbers.

    Raises:
        Exception: whatever an architecture raises that wants to see a number.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._mode = FakeTensorMode()
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(recipe.config, dtype=recipe.dtype)
            self._fuse_head(base)
            self.model: nn.Module = base if recipe.adapter is None else get_peft_model(base, recipe.adapter)
        self._put_on_fake_device()
        self.model.train()
        if recipe.gradient_checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.enable_input_require_grads()

    def _put_on_fake_device(self) -> None:
        """torch chooses its attention kernel by the device, and the device `meta` has none."""
        fakes: dict[int, Tensor] = {}
        with self._mode:
            for module in self.model.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, real in tensors.items():
                        if real is None:
                            continue
                        if id(real) not in fakes:  # weights may be tied
                            fake: Tensor = torch.empty(real.shape, dtype=real.dtype, device="cpu")
                            is_parameter = isinstance(real, nn.Parameter)
                            fakes[id(real)] = nn.Parameter(fake, real.requires_grad) if is_parameter else fake
                        tensors[name] = fakes[id(real)]  # type: ignore[assignment]

    @staticmethod
    def _fuse_head(base: Any) -> None:
        """As TRL does it from 1.16 on; before that its pass returns logits."""
        fuse: Callable[..., None] | None = getattr(trl_utils, "add_fused_lm_head", None)
        if fuse is not None:
            fuse(base, outputs=("log_probs", "entropy"))

    # ---- what stays ----

    @cached_property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def trained(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @cached_property
    def weight_bytes(self) -> float:
        head, in_4_bit = inner_model(self.model).get_output_embeddings(), self.recipe.load_in_4bit
        # bitsandbytes leaves the head as it is.
        linear = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Linear) and m is not head}
        return sum(
            p.numel() * (BYTES_OF_4_BIT if in_4_bit and id(p) in linear and not p.requires_grad else p.element_size())
            for p in self.model.parameters()
        )

    @cached_property
    def trained_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)

    @property
    def head(self) -> Tensor:
        """The weight of the output head (V, H)."""
        weight: Tensor = inner_model(self.model).get_output_embeddings().weight
        return weight

    def are_layers_alike(self) -> bool:
        """Whether each layer is like the others, so that a pass takes as much more with each."""
        text = self.recipe.config.get_text_config()
        stacks = [m for m in inner_model(self.model).get_decoder().modules() if isinstance(m, nn.ModuleList)]
        stack = next((m for m in stacks if len(m) == text.num_hidden_layers), None)
        kinds = getattr(text, "layer_types", None) or [""]
        if stack is None or len(set(kinds)) > 1:
            return False
        return len({(type(layer), tuple(p.shape for p in layer.parameters())) for layer in stack}) == 1

    # ---- passes ----

    def learning(self, rows: int, tokens: int, *, scores: bool, beside: bool) -> Pass:
        """The student's forward and backward pass.

        Args:
            rows, tokens: of one micro-batch, padding included.
            scores: whether the policy gradient's log-probabilities are computed, or the last hidden states alone.
            beside: whether gradients of an earlier micro-batch are there already; they are not counted.
        """
        with self._pass(grad=True) as alive:
            if beside:
                for p in self.model.parameters():
                    p.grad = torch.zeros_like(p) if p.requires_grad else None
                    if p.grad is not None:
                        alive.know(p.grad)
                alive.now = alive.most = 0
            result = self._log_probs(rows, tokens) if scores else self._hidden(rows, tokens)
            held = alive.now
            result.sum().backward()
            for p in self.model.parameters():
                p.grad = None
        return Pass(held, alive.most)

    def reading(self, rows: int, tokens: int) -> int:
        """The most bytes of a pass without gradient that is asked for hidden states."""
        with self._pass(grad=False) as alive:
            self._hidden(rows, tokens)
        return alive.most

    def writing(self, rows: int, prompt_tokens: int, completion_tokens: int) -> int:
        """The most bytes while completions are sampled: of the pass over the prompts, or of the last token's."""
        base = inner_model(self.model)
        with self._pass(grad=False) as alive:
            base(**self._ids(rows, prompt_tokens), use_cache=True, **limited_logits(base, 1))
        of_prompts = alive.most
        length = prompt_tokens + completion_tokens
        with self._pass(grad=False) as alive:
            ids = self._ids(rows, length - 1)
            cache = base(**ids, use_cache=True, **limited_logits(base, 1)).past_key_values
            alive.most = alive.now
            mask = torch.ones(rows, length, dtype=torch.long)
            token = torch.zeros(rows, 1, dtype=torch.long)
            logits = base(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True).logits
            scores = logits.float().clone()  # a copy to change by temperature, and the probabilities to draw from
            torch.softmax(scores / 2, dim=-1)
        return max(of_prompts, alive.most)

    @contextmanager
    def _pass(self, *, grad: bool) -> Iterator[_Alive]:
        self.model.train(grad)
        alive, kind = _Alive(), self.recipe.autocast
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            alive.know(tensor)
        with self._mode, alive, torch.set_grad_enabled(grad), torch.autocast("cpu", kind, enabled=kind is not None):
            yield alive

    def _ids(self, rows: int, tokens: int) -> dict[str, Tensor]:
        return {
            "input_ids": torch.zeros(rows, tokens, dtype=torch.long),
            "attention_mask": torch.ones(rows, tokens, dtype=torch.long),
        }

    def _hidden(self, rows: int, tokens: int) -> Tensor:
        decoder = inner_model(self.model).get_decoder()
        hidden: Tensor = decoder(**self._ids(rows, tokens), use_cache=False).last_hidden_state
        return hidden

    def _log_probs(self, rows: int, tokens: int) -> Tensor:
        ids = self._ids(rows, tokens)
        if not hasattr(trl_utils, "add_fused_lm_head"):
            logits: Tensor = self.model(**ids, use_cache=False).logits
            return logits
        output: Any = self.model(**ids, labels=ids["input_ids"].clone(), fused_lm_head=True)
        log_probs: Tensor = output.log_probs
        return log_probs


class Passes:
    """The passes of a model, from those of the same model with two layers and with three where its layers are alike.

    From one layer to two a pass may take more than from there on, for the first has no layer before it.

    Attributes:
        whole: the model.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.whole = SimulatedModel(recipe)
        self._layers = recipe.config.get_text_config().num_hidden_layers  # of one that sees, too
        self._small = (
            [SimulatedModel(_with_layers(recipe, count)) for count in FEW_LAYERS]
            if self._layers > FEW_LAYERS[1] and self.whole.are_layers_alike()
            else []
        )

    def learning(self, rows: int, tokens: int, *, scores: bool, beside: bool) -> Pass:
        """As in `SimulatedModel`."""
        found = [model.learning(rows, tokens, scores=scores, beside=beside) for model in self._asked]
        return Pass(self._extended([p.held for p in found]), self._extended([p.most for p in found]))

    def reading(self, rows: int, tokens: int) -> int:
        """As in `SimulatedModel`."""
        return self._extended([model.reading(rows, tokens) for model in self._asked])

    def writing(self, rows: int, prompt_tokens: int, completion_tokens: int) -> int:
        """As in `SimulatedModel`."""
        return self._extended([model.writing(rows, prompt_tokens, completion_tokens) for model in self._asked])

    @property
    def _asked(self) -> list[SimulatedModel]:
        return self._small or [self.whole]

    def _extended(self, found: list[int]) -> int:
        return found[0] + (self._layers - FEW_LAYERS[0]) * (found[1] - found[0]) if self._small else found[0]


def _with_layers(recipe: Recipe, count: int) -> Recipe:
    config = copy.deepcopy(recipe.config)
    text = config.get_text_config()
    text.num_hidden_layers = count
    if kinds := getattr(text, "layer_types", None):
        text.layer_types = kinds[:count]
    return replace(recipe, config=config)
