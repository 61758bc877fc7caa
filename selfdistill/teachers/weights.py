"""Whose weights teach: the frozen start, an average, the student itself, a copy of it, a mixture, or another model.

All but `Model` keep one model in memory. What differs from the student are only its trainable parameters (the
adapter under LoRA, everything in full training); a shadow copy of them is put in place for the teacher's forward
pass and taken out again. With the adapter frozen at its start, that is the model with its adapter switched off.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from selfdistill.errors import UserError
from selfdistill.models.sharding import give_up_gathered, shard
from selfdistill.teachers.language import Speaker, compare_models, files_of


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name; TRL's frozen copy of an adapter (`ref`) is none of them."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and ".ref." not in name}


class Weights:
    """The student's own weights, as they are at the moment (`live`).

    `views` gives the passes the teacher needs: one, or two whose logits are mixed with `mix_coef`.
    """

    mix_coef = 0.0  # weight of the second view
    cadence = "step"  # or "rollout": updated once per batch of rollouts
    keeps_copy = False  # whether the trained parameters are kept a second time and put into the student's place

    def attach(self, model: nn.Module) -> None:
        """Called once before training, with the unwrapped student."""
        self.model = model

    def update(self, step: int) -> None:
        """Called after every optimizer step (or rollout batch, by `cadence`) with the number of steps done."""

    def views(self) -> Iterator[nn.Module | None]:
        """Yields once per teacher pass: a module to run, or None for the student's own.

        The student's module has the teacher's parameters until the next pass is asked for.
        """
        yield None

    def generating(self) -> AbstractContextManager[None]:
        """The student's module samples as the teacher inside.

        Raises:
            UserError: these weights cannot sample.
        """
        return nullcontext()

    def check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UserError unless the teacher gives every token the id that the student's tokenizer gives it."""

    def compare(self, student: Speaker) -> list[str]:
        """How the model behind these weights is asked and ends otherwise than the student, each with what to set.

        Raises:
            UserError: the two have no end in common.
        """
        return []

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must keep, by parameter name."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if state:
            raise UserError(
                f"The checkpoint holds a teacher's weights but teacher.weights={type(self).__name__} keeps none."
            )


class Live(Weights):
    """q = the student itself, gradient stopped. Diverges in the SDFT and SDPO papers; here for comparison."""


class _Shadowed(Weights):
    """Keeps a copy of the trainable parameters; of a sharded model, of this process's shards."""

    keeps_copy = True
    dtype: torch.dtype | None = None  # of the copy; None keeps each parameter's own

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        self.shadow = {name: p.to(self.dtype or p.dtype, copy=True) for name, p in self._own().items()}

    def _own(self) -> dict[str, torch.Tensor]:
        """The student's parameters as they are kept: the numbers of a tensor or of a shard, without gradient."""
        give_up_gathered(self.model)
        return {name: shard(p.detach()) for name, p in trainable(self.model).items()}

    @contextmanager
    def exchanged(self) -> Iterator[None]:
        """Inside, the model has the copied parameters, and afterwards its own again.

        No numbers are moved in memory where dtype and device are the same, except for shards: FSDP2 gathers from the
        memory that it has given them, so that they are exchanged there.
        """
        own = self._own()
        parameters = trainable(self.model)
        sharded = {name for name, p in parameters.items() if isinstance(p, DTensor)}
        kept = {name: own[name].clone() for name in sharded}
        try:
            for name, p in parameters.items():
                if name in sharded:
                    own[name].copy_(self.shadow[name])
                else:
                    p.data = self.shadow[name].to(device=p.device, dtype=p.dtype)
            yield
        finally:
            give_up_gathered(self.model)
            for name, p in parameters.items():
                if name in sharded:
                    own[name].copy_(kept[name])
                else:
                    p.data = own[name]

    def views(self) -> Iterator[nn.Module | None]:
        with self.exchanged():
            yield None

    def generating(self) -> AbstractContextManager[None]:
        return self.exchanged()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.shadow)

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if state.keys() != self.shadow.keys():
            odd = sorted(state.keys() ^ self.shadow.keys())[0]
            raise UserError(f"The checkpoint's teacher does not fit this model: {odd} is in only one of them.")
        self.shadow = {name: state[name].to(old.device, old.dtype) for name, old in self.shadow.items()}


class Base(_Shadowed):
    """q = the model as it was when training began (frozen; the adapter's start under LoRA)."""


class Ema(_Shadowed):
    """Exponential moving average: theta_T <- (1 - rate) theta_T + rate theta, kept in float32.

    A bfloat16 average at rate 0.01 moves a third of the way it should, so the shadow is float32 whatever the model
    is. It starts as an exact copy of the student, also when that starts from a trained adapter.

    Args:
        rate: weight of the student in each update, in (0, 1]; the papers use 0.01 to 0.05.
        cadence: "step" updates after every optimizer step, "rollout" after every batch of rollouts.
    """

    dtype = torch.float32

    def __init__(self, rate: float = 0.05, cadence: str = "step") -> None:
        if not 0 < rate <= 1:
            raise UserError(
                f"teacher.weights.rate={rate} is outside (0, 1]: it is the student's weight per update, e.g. 0.05."
            )
        if cadence not in ("step", "rollout"):
            raise UserError(f"teacher.weights.cadence={cadence!r}: write step or rollout.")
        self.rate, self.cadence = rate, cadence

    @torch.no_grad()
    def update(self, step: int) -> None:
        for name, p in self._own().items():
            self.shadow[name].lerp_(p.to(self.shadow[name]), self.rate)


class Copy(_Shadowed):
    """q = the student of every `every`-th step, frozen in between."""

    def __init__(self, every: int = 10) -> None:
        if every < 1:
            raise UserError(f"teacher.weights.every={every}: write the number of steps between copies, at least 1.")
        self.every = every

    @torch.no_grad()
    def update(self, step: int) -> None:
        if step % self.every == 0:
            for name, p in self._own().items():
                self.shadow[name].copy_(p)


class TrustRegion(_Shadowed):
    """q proportional to q_ref^(1 - coef) * pi_theta^coef: the softmax of the interpolated logits (SDPO, section 4).

    Both see the teacher's prompt; the reference is the frozen start. Two teacher passes.
    """

    def __init__(self, coef: float = 0.3) -> None:
        if not 0 <= coef <= 1:
            raise UserError(f"teacher.weights.coef={coef} is outside [0, 1]: 0 is the frozen start, 1 the student.")
        self.mix_coef = coef

    def views(self) -> Iterator[nn.Module | None]:
        with self.exchanged():
            yield None
        yield None

    def generating(self) -> AbstractContextManager[None]:
        raise UserError(
            "rollout.from_teacher: a mixture (teacher/weights=trust_region) cannot sample; take base or ema."
        )


class Model(Weights):
    """q = another local model with the same vocabulary.

    Args:
        name: hub name or folder, `embedded`, or a model in memory.
        tokenizer: of a model in memory; without one its vocabulary is taken to be the student's.
        dtype: its precision; `auto` takes the checkpoint's.
    """

    def __init__(
        self,
        name: str | nn.Module,
        dtype: str = "auto",
        local_files_only: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **loading: Any,
    ) -> None:
        self.loading = {"dtype": dtype, "local_files_only": local_files_only, **loading}
        self.module: nn.Module | None = None if isinstance(name, str) else name
        self.name = name if isinstance(name, str) else type(name).__name__
        self.tokenizer = tokenizer

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        if self.module is None:
            from selfdistill.models.loading import load_model

            self.module, self.tokenizer = load_model(name=self.name, key="teacher.weights.name", **self.loading)
        self.module.requires_grad_(False).eval().to(next(model.parameters()).device)

    def check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.tokenizer is None:
            return
        ours, theirs = tokenizer.get_vocab(), self.tokenizer.get_vocab()
        if ours != theirs:
            token = next(token for token in (*ours, *theirs) if ours.get(token) != theirs.get(token))
            raise UserError(
                f"teacher.weights.name={self.name}: its vocabulary is not the student's ({len(theirs)} tokens against "
                f"{len(ours)}; {token!r} is {theirs.get(token)} there and {ours.get(token)} here). A teacher that "
                "scores tokens needs the same tokenizer; a served teacher with teacher.mode=write does not."
            )

    def compare(self, student: Speaker) -> list[str]:
        if self.module is None:  # not attached yet: its files say as much
            tokenizer: PreTrainedTokenizerBase | None
            tokenizer, declared = files_of(self.name, local_files_only=self.loading["local_files_only"])
        else:
            settings = getattr(self.module, "generation_config", None)  # any module may teach
            tokenizer, declared = self.tokenizer, None if settings is None else settings.eos_token_id
        return compare_models(student, tokenizer, declared, f"teacher.weights.name={self.name}")

    def views(self) -> Iterator[nn.Module | None]:
        yield self.module

    def generating(self) -> AbstractContextManager[None]:
        raise UserError(
            "rollout.from_teacher: another model (teacher/weights=model) cannot sample within the run; serve it, let "
            "it write its answers as data, or take teacher/weights=base or ema."
        )
