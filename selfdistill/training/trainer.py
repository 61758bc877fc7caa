"""The one trainer: TRL's GRPO with a teacher beside it.

    loss = policy_weight * policy gradient + beta * KL to the start
         + distillation.weight * D_alpha(student, teacher)
         + rollout.cross_entropy_weight * cross-entropy on demonstrations

A term of weight 0 costs nothing, not even a forward pass. Which published method a run is follows from the choice of
reward, teacher, context and weights; nothing here knows a method's name.
"""

import logging
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer

from selfdistill import losses
from selfdistill.config.settings import Distillation, RolloutSource
from selfdistill.errors import UserError
from selfdistill.models.reference import copy_weights, loadable
from selfdistill.models.structure import (
    aligned,
    captured_hidden,
    completion_hidden,
    has_dropout,
    head_of,
    inner_model,
    is_reference,
)
from selfdistill.rewards.adapter import adapt
from selfdistill.rewards.scorer import PolicyScorer
from selfdistill.rollout import Rollouts, text_of
from selfdistill.teachers.callback import TeacherCallback
from selfdistill.training import checkpoints as resumption
from selfdistill.training.distiller import Distiller, States, token_logps

log = logging.getLogger(__name__)

LONGEST_ROWS = 64  # by characters: among them is the one with most tokens, or nearly so


def no_reward(completions: list, **_: Any) -> list[float]:
    """Stands where TRL insists on a reward and the run has none."""
    return [0.0] * len(completions)


class SelfDistillTrainer(GRPOTrainer):
    """TRL's GRPOTrainer, whose reward functions may give feedback and which may have a teacher.

    Args:
        model, args, train_dataset, processing_class and all other keywords: as in `trl.GRPOTrainer`. With one
            completion per prompt, use `SelfDistillConfig` instead of `GRPOConfig`.
        reward_funcs: as in `trl.GRPOTrainer`, and functions or rewards that return floats, None or
            {"score", "feedback"} per completion; may be left out with a teacher.
        teacher: `selfdistill.teachers.Teacher` or a served one; None for a plain policy gradient.
        distillation: `Distillation`, read only with a teacher.
        rollout: `RolloutSource`.
        on_rollouts: called with (rollouts, teacher_prompts, tensors) after every generation, to record them.

    Raises:
        UserError: a combination that cannot work.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        *,
        teacher: Any = None,
        distillation: Distillation | None = None,
        rollout: RolloutSource | None = None,
        on_rollouts: Callable[..., None] | None = None,
        **kwargs: Any,
    ) -> None:
        self.teacher = teacher
        self.rollout = rollout or RolloutSource()
        self.distillation = distillation or Distillation()
        self.policy_weight = self.distillation.policy_weight if teacher is not None else 1.0
        self.on_rollouts = on_rollouts
        self.rewards, weights = adapt(reward_funcs) if reward_funcs else ([], None)
        self._rows: list[dict] = []
        self._sampled_prompt_ids: list[list[int]] = []
        self._policy_logps: Tensor | None = None
        self._is_demonstration: list[bool] = []
        if not self.rewards:
            if teacher is None and not self.rollout.cross_entropy_weight:
                raise UserError(
                    "Nothing to learn from: give a reward, a teacher, or demonstrations with a cross-entropy weight."
                )
            self.policy_weight = 0.0
        if args is not None and weights is not None and args.reward_weights is None:
            args.reward_weights = weights
        self._check_rollout(kwargs)
        _check_context(teacher, train_dataset)
        with loadable(model, needed=args is not None and args.beta != 0 and kwargs.get("peft_config") is None):
            super().__init__(
                model=model, reward_funcs=self.rewards or [no_reward], args=args, train_dataset=train_dataset, **kwargs
            )
        self._check_size(train_dataset)
        unwrapped = self.accelerator.unwrap_model(self.model)
        if self.ref_model is not None and not self._sharded:
            copy_weights(unwrapped, self.accelerator.unwrap_model(self.ref_model))
        for reward in self.rewards:
            if hasattr(reward, "bind"):
                reward.bind(PolicyScorer(unwrapped, self._tokenizer))
        self.distiller = None if teacher is None else Distiller(teacher, self.distillation, self)
        if teacher is not None:
            self._attach_teacher(unwrapped)

    def _check_rollout(self, given: dict[str, Any]) -> None:
        if self.rollout.from_teacher:
            if getattr(self.teacher, "weights", None) is None:
                raise UserError("rollout.from_teacher=true needs a local teacher, for example teacher=demonstration.")
            self.teacher.weights.generating()  # refuses here if it cannot
        if self.rollout.from_teacher or self.rollout.on_policy_fraction < 1:
            for several_turns in ("tools", "environment_factory", "rollout_func"):
                if given.get(several_turns):
                    raise UserError(f"rollout: {several_turns} goes with the student's own completions only.")

    def _check_size(self, dataset: Any) -> None:
        """Rows that do not fill a batch are left out, which may be all of them."""
        together = self.args.generation_batch_size // self.num_generations
        if hasattr(dataset, "__len__") and len(dataset) < together:
            raise UserError(
                f"The training data has {len(dataset)} rows, but completions are sampled for {together} prompts at a "
                "time, so that nothing would be trained. Give more rows, or a smaller batch (per_device_batch_size, "
                "accumulation_steps, steps_per_generation), or more completions per prompt."
            )

    def _attach_teacher(self, model: Any) -> None:
        top_k, size = self.distillation.top_k, len(inner_model(model).get_output_embeddings().weight)
        if top_k and top_k > size:
            raise UserError(f"distillation.top_k={top_k} is above the vocabulary of {size} tokens.")
        weights = getattr(self.teacher, "weights", None)
        if weights is None:
            return
        if weights.exchanges and self._sharded:
            raise UserError(
                f"teacher.weights={type(weights).__name__} keeps a copy of the trained parameters, which FSDP and "
                "ZeRO-3 shard. Train with data parallelism or ZeRO-2, or take teacher/weights=live, model or a server."
            )
        weights.attach(model)
        weights.check_vocabulary(self._tokenizer)
        self.add_callback(TeacherCallback(weights))

    @property
    def _sharded(self) -> bool:
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        return self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)

    @property
    def has_policy_term(self) -> bool:
        """Whether TRL's loss is computed: the policy gradient, the KL penalty, or distillation as an advantage."""
        return bool(self.policy_weight or self.beta or self._teaches_by_advantage)

    @property
    def _teaches_by_advantage(self) -> bool:
        return self._teaches and self.distillation.signal == "advantage"

    @property
    def _teaches(self) -> bool:
        return self.teacher is not None and self.distillation.weight > 0

    @property
    def windows_per_generation(self) -> float:
        """How many optimizer steps the rollouts generated together are spread over."""
        return self.args.steps_per_generation / self.current_gradient_accumulation_steps

    # ---- rollouts: who writes the completions, who judges them, what the teacher is shown ----

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        self._rows, self._policy_logps = inputs, None
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        weights = getattr(self.teacher, "weights", None)
        if weights is not None and weights.cadence == "rollout" and self.state.global_step:
            weights.update(self.state.global_step)
        output = super()._generate_and_score_completions(inputs)
        if not self.rewards:  # those of `no_reward` would read as if something had gone wrong
            for name in [name for name in self._metrics["train"] if "reward" in name and not name.startswith("time/")]:
                del self._metrics["train"][name]
        if self.rollout.cross_entropy_weight:
            output["demonstration_weights"] = self._demonstration_weights(output)
        prompts = None
        if self._teaches:
            prompts = self._teacher_prompts(self._rollouts)
            ids = self._teacher_prompt_ids(prompts)
            output |= self.distiller.inputs(self._rollouts, prompts, ids, output)
            if self.distillation.route == "failures":
                output["advantages"] = output["advantages"].masked_fill(output["distill_mask"].any(dim=1), 0.0)
        if self._teaches_by_advantage:
            told = self.distiller.token_advantages(self.model, output, self.args.per_device_train_batch_size)
            output["advantages"] = output["advantages"][:, None] * self.policy_weight + told * self.distillation.weight
        if self.on_rollouts is not None:
            self.on_rollouts(self._rollouts, prompts, output)
        return output

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._teaches and not self._teaches_by_advantage and self._buffered_inputs is not before:
            self.distiller.prefetch(self._buffered_inputs)
        return inputs

    def _generate_single_turn(
        self, prompt_ids: list, images: Any, multimodal_fields: Any, num_generations: int, *args: Any, **kwargs: Any
    ) -> Any:
        start = time.perf_counter()
        self._sampled_prompt_ids = prompt_ids
        self._is_demonstration = self._off_policy_rows(len(prompt_ids), num_generations)
        asked, as_teacher = prompt_ids, nullcontext()
        if self.rollout.from_teacher and self.model.training:
            shown = self._teacher_prompts(self._blank_rollouts(self._rows, num_generations))
            ids = self._teacher_prompt_ids(shown)
            asked = [own if s is None else i for own, s, i in zip(prompt_ids, shown, ids, strict=True)]
            as_teacher = self.teacher.weights.generating()
        on_policy = [i for i, demonstrated in enumerate(self._is_demonstration) if not demonstrated]
        written, logprobs = [], None
        if on_policy:
            with as_teacher:
                written, logprobs = super()._generate_single_turn(
                    [asked[i] for i in on_policy], images, multimodal_fields, num_generations, *args, **kwargs
                )
        if self.model.training and (self.rollout.from_teacher or len(on_policy) < len(prompt_ids)):
            logprobs = None  # not the student's, or not of every row: no ratio can be formed from them
        if len(on_policy) < len(prompt_ids):
            by_row = dict(zip(on_policy, written, strict=True))
            written = [by_row[i] if i in by_row else self._demonstration_ids(i) for i in range(len(prompt_ids))]
        self._log_seconds("time/generate_s", start)
        return written, logprobs

    def _off_policy_rows(self, count: int, num_generations: int) -> list[bool]:
        """Whole groups take their demonstration; which ones depends on seed and step alone, so that a resumed run agrees."""
        fraction = self.rollout.on_policy_fraction
        if not self.model.training or fraction == 1:
            return [False] * count
        first = self.accelerator.process_index * count
        groups = [(first + i) // num_generations for i in range(count)]
        return [random.Random(f"{self.args.seed} {self._step} {group}").random() >= fraction for group in groups]

    def _demonstration_ids(self, index: int) -> list[int]:
        field = self.rollout.demonstration_field
        texts = self._rows[index].get(field)
        text = texts[0] if isinstance(texts, list) and texts else texts
        if not isinstance(text, str) or not text:
            columns = ", ".join(sorted(self._rows[index]))
            raise UserError(
                f"rollout.demonstration_field={field}: a row has no demonstration there (columns: {columns})."
            )
        ids = [*self._tokenizer(text, add_special_tokens=False)["input_ids"], self._tokenizer.eos_token_id]
        if len(ids) > self.max_completion_length:
            _warn_of_cut(field, len(ids), self.max_completion_length)
        return ids[: self.max_completion_length]  # as a completion that reaches the limit: without its end

    def _demonstration_weights(self, output: dict[str, Any]) -> Tensor:
        """Each token's weight (B, T) in the cross-entropy: a mean over demonstrated tokens, times the share of such rows."""
        mask = output["completion_mask"]
        demonstrated = torch.tensor(self._is_demonstration, device=mask.device)
        kind = {"row_active": demonstrated, "count_inactive_rows": False}
        tokens = self.accelerator.reduce(losses.aggregation_normalizer(mask, "token_mean", **kind), "mean")
        share = self.accelerator.reduce(demonstrated.float().mean(), "mean")
        weights = losses.aggregation_weights(mask, "token_mean", **kind, normalizer=tokens)
        return weights * share * self.windows_per_generation

    @staticmethod
    def _blank_rollouts(rows: list[dict], num_generations: int) -> Rollouts:
        count = len(rows)
        columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
        nothing: list[None] = [None] * count
        prompts = [row["prompt"] for row in rows]
        return Rollouts(prompts, [""] * count, [[]] * count, columns, nothing, list(nothing), num_generations)

    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, completion_ids_list: list) -> Tensor:
        start = time.perf_counter()
        self._rollouts = self._blank_rollouts(
            self._rows, self.num_generations if self.model.training else self.num_generations_eval
        )
        self._rollouts.completions = [text_of(c) for c in completions]
        self._rollouts.completion_ids = completion_ids_list
        known: dict[str, Any] = {"prompt_ids": self._sampled_prompt_ids}
        # TRL computes them at the sampling temperature, and not of completions that it masks.
        if self._policy_logps is not None and self.temperature == 1.0 and not self.mask_truncated_completions:
            rows = zip(self._policy_logps, completion_ids_list, strict=True)
            known["policy_logprobs"] = [logps[: len(ids)] for logps, ids in rows]
        adapted = [reward for reward in self.rewards if hasattr(reward, "feedback")]
        for reward in adapted:
            reward.known = known
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if self.rewards:
            first = self.accelerator.process_index * len(prompts)
            self._rollouts.scores = _weighted(rewards[first : first + len(prompts)], self.reward_weights)
        if adapted:
            told = zip(*(reward.feedback for reward in adapted), strict=True)
            self._rollouts.feedback = ["\n".join(filter(None, row)) or None for row in told]
        self._log_seconds("time/reward_s", start)
        return rewards

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        # Without gradient TRL scores the whole batch: by the policy (old log-probabilities), then by the reference.
        if not torch.is_grad_enabled() and self._policy_logps is None and model is self.model:
            as_scored = not model.training or not has_dropout(model)
            if as_scored and not is_reference(model):
                self._policy_logps = result[0]
        return result

    def _teacher_prompts(self, rollouts: Rollouts) -> list:
        """What the teacher is shown for each rollout; a context sees whole groups, wherever they were sampled."""
        if self.accelerator.num_processes == 1:
            return self.teacher.context.prompts(rollouts, self._tokenizer)
        own = (rollouts.prompts, rollouts.completions, rollouts.completion_ids, rollouts.scores, rollouts.feedback)
        prompts, texts, ids, scores, feedback = (gather_object(list(values)) for values in own)
        columns = {key: gather_object(list(rollouts.columns[key])) for key in sorted(rollouts.columns)}
        everyone = Rollouts(prompts, texts, ids, columns, scores, feedback, rollouts.num_generations)
        first = self.accelerator.process_index * len(rollouts)
        return self.teacher.context.prompts(everyone, self._tokenizer)[first : first + len(rollouts)]

    def longest_teacher_tokens(self) -> int:
        """Of teacher prompt and completion together, as far as can be said before there are rollouts."""
        rows = sorted(self.train_dataset, key=lambda row: len(str(row)))[-LONGEST_ROWS:]
        student = [row["prompt"] for row in rows]
        shown = self.teacher.context.prompts(self._blank_rollouts(rows, 1), self._tokenizer)
        ids = self._teacher_prompt_ids(student) + self._teacher_prompt_ids(shown)
        return max(map(len, ids)) + self.max_completion_length

    def _teacher_prompt_ids(self, prompts: list) -> list[list[int]]:
        """Tokenised as the student's are; a missing prompt stands as one padding token."""
        filled = [i for i, prompt in enumerate(prompts) if prompt is not None]
        ids = self._tokenize_prompts([prompts[i] for i in filled])[0] if filled else []
        by_row = dict(zip(filled, ids, strict=True))
        return [by_row.get(i, [self._tokenizer.pad_token_id]) for i in range(len(prompts))]

    # ---- the loss ----

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        start = time.perf_counter()
        terms = []
        with captured_hidden(model) as captured:
            if self.has_policy_term:
                scaled = inputs["advantages"] * (1.0 if self._teaches_by_advantage else self.policy_weight)
                terms.append(super()._compute_loss(model, {**inputs, "advantages": scaled}))
        # Tokens that the other terms read. Where several processes train, all make the pass that one of them needs.
        masks = {}
        if self._teaches and not self._teaches_by_advantage and "distill_mask" in inputs:
            masks["distillation"] = inputs["distill_mask"]
        if "demonstration_weights" in inputs:
            masks["demonstration"] = inputs["demonstration_weights"] > 0
        if self.accelerator.num_processes == 1:
            masks = {name: mask for name, mask in masks.items() if mask.any()}
        if masks:
            states = self._states(model, inputs, torch.stack(list(masks.values())).any(dim=0), captured)
        if "distillation" in masks:
            terms.append(self.distillation.weight * self.distiller.loss(model, inputs, states))
        if "demonstration" in masks:
            terms.append(self.rollout.cross_entropy_weight * self._cross_entropy(model, inputs, states))
        if not terms:  # nothing to learn: a zero on the graph
            terms.append(next(p for p in self.model.parameters() if p.requires_grad).sum() * 0.0)
        self._log_seconds("time/loss_s", start)
        return sum(terms[1:], terms[0])

    def _states(self, model: Any, inputs: dict[str, Any], mask: Tensor, captured: list[Tensor]) -> States:
        """The student's hidden states: of the pass that the policy gradient made, or of the rows in `mask` alone."""
        prompt_ids, ids, attention = inputs["prompt_ids"], inputs["completion_ids"], inputs["completion_mask"]
        if captured:
            hidden = aligned(captured[-1], prompt_ids.size(1), ids.size(1))
            return lambda tokens: hidden[tokens]
        rows = mask.any(dim=1)
        if not rows.any():
            rows[0] = True
        longest = max(int(attention[rows].sum(dim=1).max()), 1)
        with self.accelerator.autocast():
            completion = ids[rows][:, :longest], attention[rows][:, :longest]
            hidden = completion_hidden(model, prompt_ids[rows], inputs["prompt_mask"][rows], *completion)
        return lambda tokens: hidden[tokens[rows][:, :longest]]

    def _cross_entropy(self, model: Any, inputs: dict[str, Any], states: States) -> Tensor:
        """Weighted sum of the negative log-probabilities of the demonstrations' tokens, at temperature 1."""
        tokens = inputs["demonstration_weights"] > 0
        weights = inputs["demonstration_weights"][tokens]
        logps = token_logps(states(tokens), inputs["completion_ids"][tokens], head_of(model), 1.0, weights)
        self._metrics["train"]["cross_entropy"].append(-logps.detach().sum().item() / max(len(logps), 1))
        return -(logps * weights).sum()

    def _log_seconds(self, name: str, start: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(time.perf_counter() - start)

    # ---- checkpoints ----

    def _get_train_sampler(self, dataset: Any = None) -> resumption.ResumableSampler:
        return resumption.ResumableSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        resumption.save(Path(self._get_output_dir(trial=trial)) / name, self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        resumption.restore(Path(resume_from_checkpoint), self)


@cache
def _warn_of_cut(field: str, tokens: int, limit: int) -> None:
    log.warning(
        "a %s has %d tokens and is cut at rollout.max_completion_tokens=%d: how it ends is not learned",
        field,
        tokens,
        limit,
    )


def _check_context(teacher: Any, dataset: Any) -> None:
    """Raises UserError when the teacher's context needs a column that the data does not have."""
    names = getattr(dataset, "column_names", None)
    if teacher is not None and hasattr(teacher.context, "check") and names and hasattr(dataset, "__getitem__"):
        teacher.context.check({name: dataset[name] for name in names if name != "prompt"})


def _weighted(rewards: Tensor, weights: Tensor) -> list[float | None]:
    """Weighted sum of the rewards that apply (B, F) -> B; None where none does."""
    rows = []
    for row in rewards.tolist():
        applicable = [w * r for w, r in zip(weights.tolist(), row, strict=True) if r == r]
        rows.append(sum(applicable) if applicable else None)
    return rows
