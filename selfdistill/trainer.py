"""The one trainer: TRL's GRPO with a teacher beside it.

    loss = policy_weight * policy gradient + beta * KL to the start
         + distillation.weight * D_alpha(student, teacher)
         + rollout.cross_entropy_weight * cross-entropy on demonstrations

A term of weight 0 costs nothing, not even a forward pass. Which published method a run is follows from the choice of
reward, teacher, context and weights; nothing here knows a method's name.
"""

import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from selfdistill import losses
from selfdistill.errors import UserError
from selfdistill.models.structure import (
    Head,
    aligned,
    captured_hidden,
    completion_hidden,
    evaluating,
    head_of,
    inner_model,
)
from selfdistill.rewards.adapter import adapt
from selfdistill.rewards.scorer import PolicyScorer
from selfdistill.rollout import Rollouts, text_of
from selfdistill.teachers.callback import TeacherCallback

ENTROPY_SAMPLE_TOKENS = 64


@dataclass
class Distillation:
    """What is distilled and how it is weighed.

    Args:
        alpha: 0 = KL(teacher || student), 1 = KL(student || teacher), between = generalised Jensen-Shannon.
        top_k: the student's k likeliest tokens instead of the whole vocabulary.
        tail: with `top_k`, the remaining mass is one more outcome; False renormalises.
        signal: `distribution` compares distributions; `sampled_token` uses the sampled tokens' log-probabilities alone
            (alpha must be 1); `advantage` adds log q - log pi of the sampled tokens to the policy gradient's advantages.
        temperature: of both sides; None takes the sampling temperature.
        is_clip: upper bound of the importance weight pi / pi_old; None leaves the weight out.
        skip_tokens: leading completion tokens that carry no loss.
        pointwise_clip: upper bound of each vocabulary entry's contribution (OPSD).
        jsd_normalize: removes the jump of the divergence between alpha -> 0, 1 and alpha = 0, 1.
        aggregation: token_mean, seq_mean_token_mean, seq_mean_token_sum or seq_mean_token_sum_norm.
        count_inactive_rows: whether rows without a signal count in the denominator, as in the references.
        weight: of this term. policy_weight: of the policy gradient.
        route: `all` distils every row with a signal; `failures` distils rows that score below `success_threshold`
            and leaves the others to the policy gradient.
    """

    alpha: float = 0.5
    top_k: int | None = None
    tail: bool = True
    signal: str = "distribution"
    temperature: float | None = None
    is_clip: float | None = 2.0
    skip_tokens: int = 0
    pointwise_clip: float | None = None
    jsd_normalize: bool = False
    aggregation: str = "seq_mean_token_mean"
    count_inactive_rows: bool = True
    weight: float = 1.0
    policy_weight: float = 0.0
    route: str = "all"
    success_threshold: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha={self.alpha} is outside [0, 1]: 0 is KL(teacher || student), 1 is KL(student || teacher).")
        for key, choices in (("signal", ("distribution", "sampled_token", "advantage")), ("route", ("all", "failures"))):
            if getattr(self, key) not in choices:
                raise UserError(f"distillation.{key}={getattr(self, key)!r}: write one of {', '.join(choices)}.")
        if self.signal == "sampled_token" and self.alpha != 1:
            raise UserError(
                f"distillation.signal=sampled_token estimates KL(student || teacher) and needs alpha=1, not alpha={self.alpha}."
            )
        if self.top_k is not None and (self.top_k < 1 or (self.top_k == 1 and not self.tail)):
            raise UserError(f"distillation.top_k={self.top_k} must be at least 1, and at least 2 with distillation.tail=false.")


@dataclass
class RolloutSource:
    """Where completions come from.

    Args:
        on_policy_fraction: share of prompts that the student answers; the others take their demonstration (GKD's
            lambda; 0 is plain fine-tuning on demonstrations).
        from_teacher: sample from the teacher, with its context, instead of the student.
        demonstration_field: the column that holds demonstrations: a text or a list, of which the first counts.
        cross_entropy_weight: weight of the cross-entropy on rows whose completion is a demonstration.
    """

    on_policy_fraction: float = 1.0
    from_teacher: bool = False
    demonstration_field: str = "golden_response"
    cross_entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.on_policy_fraction <= 1:
            raise UserError(f"rollout.on_policy_fraction={self.on_policy_fraction} is outside [0, 1].")


@dataclass
class SelfDistillConfig(GRPOConfig):
    """TRL's arguments; `num_generations=1` is allowed, for runs without a policy gradient."""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            # raised after everything that a run with one generation needs has been set up
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise


def no_reward(completions: list, **_: Any) -> list[float]:
    """Stands where TRL insists on a reward and the run has none."""
    return [0.0] * len(completions)


class SelfDistillTrainer(GRPOTrainer):
    """TRL's GRPOTrainer, whose reward functions may give feedback and which may have a teacher.

    Args:
        model, args, train_dataset, processing_class and all other keywords: as in `trl.GRPOTrainer`. With one
            completion per prompt, use `SelfDistillConfig` instead of `GRPOConfig`.
        reward_funcs: functions or rewards that return floats, None or {"score", "feedback"}; may be left out with a teacher.
        teacher: `selfdistill.teachers.Teacher` or a served one; None for a plain policy gradient.
        distillation: `Distillation`, read only with a teacher.
        rollout: `RolloutSource`.
        on_rollouts: called with (rollouts, teacher_prompts, advantages) after every generation, to record them.
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *,
        teacher: Any = None,
        distillation: Distillation | None = None,
        rollout: RolloutSource | None = None,
        on_rollouts: Callable[..., None] | None = None,
        **kwargs: Any,
    ) -> None:
        self.teacher = teacher
        self.served = hasattr(teacher, "score")
        self.rollout = rollout or RolloutSource()
        self.distillation = distillation or (Distillation() if teacher is not None else None)
        self.policy_weight = self.distillation.policy_weight if self.distillation else 1.0
        self.on_rollouts = on_rollouts
        self.rewards, weights = adapt(reward_funcs) if reward_funcs else ([], None)
        if not self.rewards:
            if teacher is None and not self.rollout.cross_entropy_weight:
                raise UserError("Nothing to learn from: give a reward, a teacher, or demonstrations with a cross-entropy weight.")
            self.policy_weight = 0.0
        if args is not None and weights is not None and args.reward_weights is None:
            args.reward_weights = weights
        super().__init__(model=model, reward_funcs=self.rewards or [no_reward], args=args, **kwargs)
        # Each term is divided over the accumulation window here or by TRL's loss; transformers must not do it again.
        self.model_accepts_loss_kwargs = False
        unwrapped = self.accelerator.unwrap_model(self.model)
        for reward in self.rewards:
            reward.bind(PolicyScorer(unwrapped, self._tokenizer))
        if teacher is not None and not self.served:
            teacher.weights.attach(unwrapped)
            if hasattr(teacher.weights, "check_vocabulary"):
                teacher.weights.check_vocabulary(self._tokenizer)
            self.add_callback(TeacherCallback(teacher.weights))
        vocabulary = inner_model(unwrapped).get_output_embeddings().weight.size(0)
        if self.distillation and self.distillation.top_k and self.distillation.top_k > vocabulary:
            raise UserError(f"distillation.top_k={self.distillation.top_k} is above the vocabulary of {vocabulary} tokens.")
        self._rows: list[dict] = []
        self._sampled_prompt_ids: list[list[int]] = []
        self._policy_logps: Tensor | None = None
        self._is_demonstration: list[bool] = []

    # ---- rollouts: who writes the completions, who judges them, what the teacher is shown ----

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        self._rows, self._policy_logps = inputs, None
        if self.teacher is not None and not self.served and self.teacher.weights.cadence == "rollout" and self.state.global_step:
            self.teacher.weights.update(self.state.global_step)
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output
        rollouts = self._rollouts
        rollouts.scores = self._scores()
        rollouts.feedback = self._feedback()
        device = output["completion_ids"].device
        if self.rollout.cross_entropy_weight:
            output["is_demonstration"] = torch.tensor(self._is_demonstration, device=device)
        teacher_prompts = None
        if self.teacher is not None and self.distillation.weight:
            teacher_prompts = self.teacher.context.prompts(rollouts, self._tokenizer)
            output.update(self._teacher_inputs(rollouts, teacher_prompts, output))
        if self.on_rollouts is not None:
            self.on_rollouts(rollouts, teacher_prompts, output["advantages"].tolist())
        return output

    def _generate_single_turn(self, prompt_ids: list, images: Any, multimodal_fields: Any, num_generations: int, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        self._sampled_prompt_ids = prompt_ids
        count = len(prompt_ids)
        self._is_demonstration = self._off_policy_rows(count, num_generations)
        asked, view = prompt_ids, nullcontext()
        if self.rollout.from_teacher and self.model.training:
            asked = self._teacher_prompt_ids(self.teacher.context.prompts(self._blank_rollouts(num_generations), self._tokenizer))
            if hasattr(self.teacher.weights, "exchanged"):
                view = self.teacher.weights.exchanged()
        on_policy = [i for i in range(count) if not self._is_demonstration[i]]
        written, logprobs = [], None
        if on_policy:
            with view:
                written, logprobs = super()._generate_single_turn(
                    [asked[i] for i in on_policy], images, multimodal_fields, num_generations, *args, **kwargs
                )
        if self.rollout.from_teacher:
            logprobs = None  # they are the teacher's, under another prompt: no ratio can be formed from them
        if len(on_policy) < count:
            by_row = dict(zip(on_policy, written, strict=True))
            written = [by_row[i] if i in by_row else self._demonstration_ids(i) for i in range(count)]
            logprobs = None
        if self.model.training:
            self._metrics["train"]["time/generate_s"].append(time.perf_counter() - start)
        return written, logprobs

    def _off_policy_rows(self, count: int, num_generations: int) -> list[bool]:
        """Whole groups are on or off policy; the draw depends on seed and step alone, so that a resumed run repeats it."""
        if not self.model.training or self.rollout.on_policy_fraction == 1:
            return [False] * count
        draw = random.Random(f"{self.args.seed} {self.state.global_step} {self.accelerator.process_index}")
        groups = [draw.random() >= self.rollout.on_policy_fraction for _ in range(-(-count // num_generations))]
        return [groups[i // num_generations] for i in range(count)]

    def _demonstration_ids(self, index: int) -> list[int]:
        field = self.rollout.demonstration_field
        texts = self._rows[index].get(field)
        text = texts[0] if isinstance(texts, list) and texts else texts
        if not isinstance(text, str) or not text:
            columns = ", ".join(sorted(self._rows[index]))
            raise UserError(f"rollout.demonstration_field={field}: a row has no demonstration there (columns: {columns}).")
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids[: self.max_completion_length - 1], self._tokenizer.eos_token_id]

    def _columns(self) -> dict[str, list]:
        return {key: [row[key] for row in self._rows] for key in self._rows[0] if key != "prompt"}

    def _blank_rollouts(self, num_generations: int) -> Rollouts:
        count = len(self._rows)
        return Rollouts([row["prompt"] for row in self._rows], [""] * count, [[]] * count, self._columns(),
                        [None] * count, [None] * count, num_generations)  # fmt: skip

    def _calculate_rewards(self, inputs: list[dict], prompts: list, completions: list, completion_ids_list: list) -> Tensor:
        start = time.perf_counter()
        self._rollouts = self._blank_rollouts(self.num_generations if self.model.training else self.num_generations_eval)
        self._rollouts.completions = [text_of(c) for c in completions]
        self._rollouts.completion_ids = completion_ids_list
        known: dict[str, Any] = {"prompt_ids": self._sampled_prompt_ids}
        if self._policy_logps is not None and self.temperature == 1.0:
            known["policy_logprobs"] = [p[: len(ids)] for p, ids in zip(self._policy_logps, completion_ids_list, strict=True)]
        for reward in self.rewards:
            reward.known = known
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._metrics["train" if self.model.training else "eval"]["time/reward_s"].append(time.perf_counter() - start)
        return rewards

    def _scores(self) -> list[float | None]:
        """Weighted sum of the rewards per rollout; None where none applies."""
        if not self.rewards:
            return [None] * len(self._rows)
        weights = self.reward_weights.tolist()
        columns = zip(*(reward.scores for reward in self.rewards), strict=True)
        return [
            sum(w * s for w, s in zip(weights, row, strict=True) if s is not None) if any(s is not None for s in row) else None
            for row in columns
        ]

    def _feedback(self) -> list[str | None]:
        if not self.rewards:
            return [None] * len(self._rows)
        rows = zip(*(reward.feedback for reward in self.rewards), strict=True)
        return ["\n".join(filter(None, row)) or None for row in rows]

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        # The first scoring of a batch without gradient is the policy's own (old log-probabilities), where TRL makes one.
        scoring = not torch.is_grad_enabled() and self._rows and self._policy_logps is None
        if scoring and model is self.model and not _adapters_off(model):
            self._policy_logps = result[0]
        return result

    # ---- the teacher's inputs ----

    def _teacher_prompt_ids(self, prompts: list) -> list[list[int]]:
        """Tokenised as the student's are; a missing prompt stands as one padding token."""
        filled = [i for i, prompt in enumerate(prompts) if prompt is not None]
        ids = self._tokenize_prompts([prompts[i] for i in filled])[0] if filled else []
        by_row = dict(zip(filled, ids, strict=True))
        return [by_row.get(i, [self._tokenizer.pad_token_id]) for i in range(len(prompts))]

    def _teacher_inputs(self, rollouts: Rollouts, prompts: list, output: dict[str, Any]) -> dict[str, Tensor]:
        """Per row: the teacher's prompt ids, which tokens carry a signal, and each one's weight in the loss."""
        d, device = self.distillation, output["completion_ids"].device
        active = torch.tensor([prompt is not None for prompt in prompts], device=device)
        if d.route == "failures":
            failed = [score is None or score < d.success_threshold for score in rollouts.scores]
            active &= torch.tensor(failed, device=device)
            output["advantages"] = output["advantages"].masked_fill(active, 0.0)
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        mask = mask * (torch.arange(mask.size(1), device=device) >= d.skip_tokens)
        self._metrics["train"]["distill/active_fraction"].append(active.float().mean().item())
        # Normalised over everything that was generated; that feeds `windows` optimizer steps.
        windows = self.args.steps_per_generation / self.current_gradient_accumulation_steps
        weights = windows * losses.aggregation_weights(
            mask, d.aggregation, row_active=active, count_inactive_rows=d.count_inactive_rows, max_completion_tokens=self.max_completion_length
        )
        mask = mask * active[:, None]
        extra = {"distill_weights": weights, "distill_mask": mask.bool()}
        ids = self._teacher_prompt_ids(prompts)
        if self.served:
            start = time.perf_counter()
            extra |= self.teacher.tensors(ids, rollouts.completion_ids, active, mask.size(1))
            self._metrics["train"]["time/teacher_s"].append(time.perf_counter() - start)
        else:
            longest = max(map(len, ids))
            pad = self._tokenizer.pad_token_id
            extra["teacher_prompt_ids"] = torch.tensor([[pad] * (longest - len(row)) + row for row in ids], device=device)
            extra["teacher_prompt_mask"] = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
        if d.signal == "advantage":
            output.update(extra)
            output["advantages"] = output["advantages"][:, None] * self.policy_weight + self._token_advantages(output) * d.weight
        return extra

    # ---- the loss ----

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        start = time.perf_counter()
        d = self.distillation
        loss = next(p for p in self.model.parameters() if p.requires_grad).sum() * 0.0  # nothing to learn: a zero on the graph
        as_advantage = d is not None and d.signal == "advantage" and "distill_mask" in inputs
        with captured_hidden(model) as captured:
            if self.policy_weight or self.beta or as_advantage:
                scaled = inputs if as_advantage else {**inputs, "advantages": inputs["advantages"] * self.policy_weight}
                loss = loss + super()._compute_loss(model, scaled)
        if d is not None and d.weight and "distill_mask" in inputs and not as_advantage:
            loss = loss + d.weight * self._distillation_loss(model, inputs, captured[-1] if captured else None)
        if self.rollout.cross_entropy_weight and "is_demonstration" in inputs:
            loss = loss + self.rollout.cross_entropy_weight * self._cross_entropy(model, inputs)
        self._metrics["train" if self.model.training else "eval"]["time/loss_s"].append(time.perf_counter() - start)
        return loss

    def _distillation_loss(self, model: Any, inputs: dict[str, Any], hidden: Tensor | None) -> Tensor:
        """Sum over tokens of weight times divergence; `hidden` (B, P+T, H) when the policy gradient has computed it already."""
        d, rows = self.distillation, inputs["distill_mask"].any(dim=1)
        if not rows.any() and self.accelerator.num_processes == 1:
            return torch.zeros((), device=rows.device)
        if not rows.any():
            rows = rows.clone()
            rows[0] = True  # every process must make the pass that the others wait for; its weights are all 0
        ids = inputs["completion_ids"][rows]
        longest = max(int(inputs["completion_mask"][rows].sum(dim=1).max()), 1)
        ids, mask = ids[:, :longest], inputs["completion_mask"][rows][:, :longest]
        keep, weights = inputs["distill_mask"][rows][:, :longest], inputs["distill_weights"][rows][:, :longest]
        if hidden is None:
            with self.accelerator.autocast():
                student = completion_hidden(model, inputs["prompt_ids"][rows], inputs["prompt_mask"][rows], ids, mask)
        else:
            student = aligned(hidden[rows], inputs["prompt_ids"].size(1), longest)
        student, tokens, weights = student[keep], ids[keep], weights[keep]
        head, temperature = head_of(model), d.temperature or self.temperature
        if d.is_clip is not None and "old_per_token_logps" in inputs:
            now = token_logps(student.detach(), tokens, head, temperature)
            old = inputs["old_per_token_logps"][rows][:, :longest][keep]
            weights = weights * losses.importance_weight(now, old, d.is_clip)
        if self.served:
            # its log-probabilities are at temperature 1, and so is the student's side
            support = {name: inputs[name][rows][:, :longest][keep] for name in ("teacher_top_ids", "teacher_top_logps", "teacher_logps")}
            per_token = self._served_divergence(student, tokens, head, support, weights)
        else:
            start = time.perf_counter()
            views = [(h[keep], t) for h, t in self._teacher_hidden(model, inputs, rows, ids, mask)]
            self._metrics["train"]["time/teacher_s"].append(time.perf_counter() - start)
            per_token = self._divergence(student, tokens, head, views, weights, temperature)
        count = max(int(keep.sum()), 1)
        self._metrics["train"]["distill/divergence"].append(per_token.detach().sum().item() / count)
        if hidden is None:  # the policy gradient logs the entropy where it runs
            self._metrics["train"]["entropy"].append(sampled_entropy(student, head, temperature))
        return (per_token * weights).sum()

    def _teacher_hidden(self, model: Any, inputs: dict[str, Any], rows: Tensor, ids: Tensor, mask: Tensor) -> list[tuple[Tensor, Head]]:
        """The teacher's hidden states (rows, T, H) and head, once per view, without gradient."""
        views = []
        for module in self.teacher.weights.views():
            teacher = model if module is None else module
            with evaluating(teacher), self.accelerator.autocast():
                prompt_ids, prompt_mask = inputs["teacher_prompt_ids"][rows], inputs["teacher_prompt_mask"][rows]
                views.append((completion_hidden(teacher, prompt_ids, prompt_mask, ids, mask), head_of(teacher)))
        return views

    def _divergence(self, student: Tensor, tokens: Tensor, head: Head, views: list, weights: Tensor, temperature: float) -> Tensor:
        """Per token (N,), of a local teacher's one view or the mixture of two."""
        d, (teacher, teacher_head) = self.distillation, views[0]
        if d.signal == "sampled_token":
            theirs = token_logps(teacher, tokens, teacher_head, temperature)
            return losses.sampled_token_loss(token_logps(student, tokens, head, temperature, weights), theirs)
        second = (views[1][0], views[1][1].weight, self.teacher.weights.mix_coef) if len(views) > 1 else None
        return losses.chunked_token_divergence(
            student, teacher, head.weight, teacher_head.weight, alpha=d.alpha, top_k=d.top_k, tail=d.tail,
            temperature=temperature, pointwise_clip=d.pointwise_clip, jsd_normalize=d.jsd_normalize, weights=weights,
            student_bias=head.bias, teacher_bias=teacher_head.bias, logit_scale=(head.logit_scale, teacher_head.logit_scale),
            soft_cap=(head.soft_cap, teacher_head.soft_cap), mixture=second,
        )  # fmt: skip

    def _served_divergence(self, student: Tensor, tokens: Tensor, head: Head, support: dict[str, Tensor], weights: Tensor) -> Tensor:
        """Per token (N,), over the tokens whose log-probabilities the server returned."""
        d = self.distillation
        if d.signal == "sampled_token":
            return losses.sampled_token_loss(token_logps(student, tokens, head, 1.0, weights), support["teacher_logps"])
        return losses.chunked_support_divergence(
            student, head.weight, support["teacher_top_ids"], support["teacher_top_logps"], alpha=d.alpha, tail=d.tail,
            pointwise_clip=d.pointwise_clip, jsd_normalize=d.jsd_normalize, weights=weights, student_bias=head.bias,
            logit_scale=head.logit_scale, soft_cap=head.soft_cap,
        )  # fmt: skip

    @torch.no_grad()
    def _token_advantages(self, output: dict[str, Any]) -> Tensor:
        """log q - log pi of the sampled tokens (B, T), 0 where there is no signal: distillation as an advantage."""
        mask, ids = output["distill_mask"], output["completion_ids"]
        rows = mask.any(dim=1)
        advantages = torch.zeros(mask.shape, device=mask.device)
        if not rows.any():
            return advantages
        ids, attention, keep = ids[rows], output["completion_mask"][rows], mask[rows]
        with evaluating(self.model):
            hidden = completion_hidden(self.model, output["prompt_ids"][rows], output["prompt_mask"][rows], ids, attention)[keep]
            ours = token_logps(hidden, ids[keep], head_of(self.model), self.temperature)
        if self.served:
            theirs = output["teacher_logps"][rows][keep]
        else:
            teacher, head = self._teacher_hidden(self.model, output, rows, ids, attention)[0]
            theirs = token_logps(teacher[keep], ids[keep], head, self.temperature)
        values = torch.zeros(keep.shape, device=mask.device)
        values[keep] = torch.where(theirs.isfinite(), theirs - ours, 0.0)
        advantages[rows] = values
        self._metrics["train"]["distill/divergence"].append(-values.sum().item() / int(keep.sum()))  # estimates KL(student || teacher)
        return advantages

    def _cross_entropy(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Mean negative log-probability of the demonstrations' tokens, over the accumulation window."""
        rows = inputs["is_demonstration"]
        if not rows.any():
            return torch.zeros((), device=rows.device)
        ids, mask = inputs["completion_ids"][rows], inputs["completion_mask"][rows]
        sequences = torch.cat([inputs["prompt_ids"][rows], ids], dim=1)
        attention = torch.cat([inputs["prompt_mask"][rows], mask], dim=1)
        logps, _, _ = self._get_per_token_logps_and_entropies(model, sequences, attention, ids.size(1))
        loss = -(logps * mask).sum() / mask.sum()
        self._metrics["train"]["cross_entropy"].append(loss.item())
        return loss * rows.float().mean() / self.current_gradient_accumulation_steps


def token_logps(hidden: Tensor, ids: Tensor, head: Head, temperature: float, weights: Tensor | None = None) -> Tensor:
    """log p of the tokens (N,) from the states that predict them (N, H)."""
    return losses.chunked_token_logps(
        hidden, head.weight, ids, temperature=temperature, weights=weights, bias=head.bias, logit_scale=head.logit_scale, soft_cap=head.soft_cap
    )


@torch.no_grad()
def sampled_entropy(hidden: Tensor, head: Head, temperature: float) -> float:
    """Mean entropy in nats over the first few hundred tokens: enough for an alarm, and no tokens x vocabulary tensor."""
    logits = head.logits(hidden[:ENTROPY_SAMPLE_TOKENS]) / temperature
    return torch.distributions.Categorical(logits=logits).entropy().mean().item()


def _adapters_off(model: Any) -> bool:
    """Whether a PEFT model runs as its base at the moment."""
    return any(getattr(module, "disable_adapters", False) is True for module in model.modules())
