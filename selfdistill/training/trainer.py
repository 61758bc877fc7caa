"""The one trainer: TRL's GRPO with a teacher beside it.

    loss = policy_weight * policy gradient + beta * KL to the start
         + distillation.weight * D_alpha(student, teacher)
         + rollout.cross_entropy_weight * cross-entropy on demonstrations

A term of weight 0 costs nothing, not even a forward pass. Which published method a run is follows from the choice of
reward, teacher, context and weights; nothing here knows a method's name.

What is known of a batch travels on its `Rollouts`, and what is asked about a micro-batch on its `TeacherRequest`.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import DistributedType, parse_flag_from_env, set_seed
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import TrainerCallback
from trl.trainer.utils import pad

from selfdistill import losses
from selfdistill.config.settings import Distillation, RolloutSource
from selfdistill.errors import UserError
from selfdistill.losses.head import entropy_sum
from selfdistill.models.precision import adapter_weights, restore_adapter
from selfdistill.models.reference import copy_weights, loadable
from selfdistill.models.row_groups import in_row_order, row_groups
from selfdistill.models.structure import (
    aligned,
    captured_hidden,
    completion_hidden,
    evaluating,
    head_of,
    inner_model,
)
from selfdistill.rewards.adapter import AdaptedReward, adapt
from selfdistill.rewards.scorer import PolicyScorer
from selfdistill.rollout import Rollouts
from selfdistill.teachers.interface import REQUEST, BaseTeacher, TeacherRequest
from selfdistill.teachers.language import own_findings
from selfdistill.training.metrics import Means
from selfdistill.training.micro_batches import sorted_by_length
from selfdistill.training.reporting import use_standard_names
from selfdistill.training.rollout_trainer import RolloutTrainer, no_reward
from selfdistill.training.student_checks import check_student, check_zero3
from selfdistill.training.token_weights import (
    demonstration_weights,
    distillation_weights,
    distilled_tokens,
    spread_tokens,
)
from selfdistill.training.trl_trainer import GRPOConfig

__all__ = ["SelfDistillTrainer"]

log = logging.getLogger(__name__)

# Rows whose teacher's prompts are tokenised to find the longest: those with the most characters.
LONGEST_ROWS = 64

# The entropy is estimated from so many tokens of each row: enough for an alarm, and cheap beside the loss.
ENTROPY_TOKENS_PER_ROW = 4

NOTHING_TO_LEARN_FROM = (
    "Nothing to learn from: give a reward, a teacher, demonstrations with a cross-entropy weight, or an environment "
    "with a get_reward."
)

# Hidden states (N, H) of the tokens in a mask (B, T), in row order.
States = Callable[[Tensor], Tensor]
# Called after every generation with the rollouts of all processes, and with this process's tensors.
OnRollouts = Callable[[Rollouts, Mapping[str, Any]], None]


class SelfDistillTrainer(RolloutTrainer):
    """TRL's GRPOTrainer, whose reward functions may give feedback and which may have a teacher.

    Args:
        model, args, train_dataset, processing_class and all other keywords: as in `trl.GRPOTrainer`. With one
            completion per prompt, use `SelfDistillConfig` instead of `GRPOConfig`.
        reward_funcs: as in `trl.GRPOTrainer`, and functions or rewards that return floats, None or
            {"score", "feedback"} per completion; may be left out with a teacher.
        teacher: `selfdistill.teachers.Teacher` or a served one; None for a plain policy gradient.
        distillation: `Distillation`, read only with a teacher.
        rollout: `RolloutSource`.
        on_rollouts: called after every generation with the rollouts of all processes and with this process's tensors.

    Attributes:
        findings: how student and teacher are asked and end differently, each with what to set, and what could not be
            found out; also logged as warnings.

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
        teacher: BaseTeacher | None = None,
        distillation: Distillation | None = None,
        rollout: RolloutSource | None = None,
        on_rollouts: OnRollouts | None = None,
        **kwargs: Any,
    ) -> None:
        self.teacher = teacher
        self.rollout = rollout or RolloutSource()
        self.distillation = distillation or Distillation()
        self.on_rollouts = on_rollouts
        self.card = None
        self.rewards, weights = adapt(reward_funcs) if reward_funcs else ([], None)
        environments = bool(kwargs.get("environment_factory"))  # they may have rewards of their own
        if not (self.rewards or environments or teacher is not None or self.rollout.cross_entropy_weight):
            raise UserError(NOTHING_TO_LEARN_FROM)
        self.policy_weight = 1.0 if teacher is None else self.distillation.policy_weight
        if not (self.rewards or environments):
            self.policy_weight = 0.0
        if self.policy_weight and args is not None and args.num_generations == 1:
            raise UserError(
                "num_generations=1 leaves a policy gradient nothing to compare: give at least 2, or with a teacher "
                "Distillation(policy_weight=0)."
            )
        if args is not None and weights is not None and args.reward_weights is None:
            args.reward_weights = weights
        if args is not None and args.ddp_find_unused_parameters is None:
            # Every trained parameter takes part in every loss, and DDP warns where it looked for others in vain.
            args.ddp_find_unused_parameters = False
        self._means = {"train": Means(), "eval": Means()}
        self._check_rollout(kwargs)
        _check_columns(teacher, train_dataset)
        adapter = adapter_weights(model)
        has_reference = args is not None and args.beta != 0 and kwargs.get("peft_config") is None
        check_zero3(
            {
                "teacher": teacher is not None,
                "cross_entropy_weight": bool(self.rollout.cross_entropy_weight),
                "beta, with a model that is trained in full,": has_reference and not adapter,
            }
        )
        with loadable(model, needed=has_reference):
            super().__init__(
                model=model, reward_funcs=self.rewards or [no_reward], args=args, train_dataset=train_dataset, **kwargs
            )
        use_standard_names(self)
        if self.use_vllm and self.vllm_mode == "colocate":
            set_seed(self.args.seed, device_specific=True)  # an engine in this process has set its own, always the same
        asked = parse_flag_from_env("ACCELERATE_USE_FSDP") or self.args.fsdp  # accelerate leaves it out on a CPU
        if asked and self.accelerator.num_processes > 1 and self.accelerator.distributed_type != DistributedType.FSDP:
            raise UserError(
                "FSDP needs GPUs: on a CPU accelerate does not shard. Start the processes with torchrun, without an "
                "FSDP configuration."
            )
        self._take_environments_rewards()
        if not (self.rewards or teacher is not None or self.rollout.cross_entropy_weight):
            raise UserError(NOTHING_TO_LEARN_FROM)
        if not self.rewards:
            self.policy_weight = 0.0
        if self.sharded and self.tools and not self.use_vllm:
            raise UserError(
                "tools: every pass of a sharded model takes all processes, and how often one calls its tools depends "
                "on its own completions. Generate with vLLM (use_vllm=True), or train with data parallelism or ZeRO-2."
            )
        self._check_size(train_dataset)
        student = self.accelerator.unwrap_model(self.model)
        restore_adapter(student, adapter)
        if self.ref_model is not None and (self.accelerator.is_fsdp2 or not self.sharded):
            copy_weights(student, self.accelerator.unwrap_model(self.ref_model))
        self.findings = check_student(self, student)
        for reward in self.rewards:
            if isinstance(reward, AdaptedReward):
                most = self.most_of_any_process if self.sharded else None
                reward.bind(PolicyScorer(student, self._tokenizer, most_of_any_process=most))
        speaker = self._student()
        self.findings += own_findings(speaker)
        self._stop_at(speaker.ends)
        if teacher is not None:
            self._attach(teacher, student)
            self.findings += teacher.compare(speaker)
        for finding in self.findings if self.accelerator.is_main_process else ():
            log.warning("%s", finding)

    def _check_size(self, dataset: Any) -> None:
        """Rows that do not fill a batch are left out, which may be all of them."""
        together = self._prompts_per_generation
        if hasattr(dataset, "__len__") and len(dataset) < together:
            raise UserError(
                f"The training data has {len(dataset)} rows, but completions are sampled for {together} prompts at a "
                "time, so that nothing would be trained. Give more rows, or a smaller batch (per_device_batch_size, "
                "accumulation_steps, steps_per_generation), or more completions per prompt."
            )

    def _attach(self, teacher: BaseTeacher, student: nn.Module) -> None:
        self.distillation.check_vocabulary(len(inner_model(student).get_output_embeddings().weight))
        if not self.accelerator.is_fsdp2:
            teacher.attach(student, self._tokenizer, sharded=self.sharded)
        if teacher.context_tokens is not None:
            teacher.check_length(self._longest_teacher_tokens(teacher))
        self.add_callback(_AfterStep(teacher))

    def _longest_teacher_tokens(self, teacher: BaseTeacher) -> int:
        """Of teacher prompt and completion together, as far as can be said before there are rollouts."""
        rows = sorted(self.train_dataset, key=lambda row: len(str(row)))[-LONGEST_ROWS:]
        rollouts = Rollouts.of_rows(rows, 1)
        prompts = [*rollouts.prompts, *teacher.prompts(rollouts, self._tokenizer)]
        return max(map(len, self._teacher_prompt_ids(prompts))) + self.max_completion_length

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

    def _mean(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "mean")

    # ---- rollouts: who writes the completions, who judges them, what the teacher is shown ----

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        training = self.model.training
        rollouts = Rollouts.of_rows(inputs, self.num_generations if training else self.num_generations_eval)
        self._rollouts = rollouts
        if not training:
            return super()._generate_and_score_completions(inputs)
        if self.teacher is not None and self.teacher_moved != self._step:  # equal in a step that begins again
            self.teacher.before_rollouts(self.state.global_step)
            self.teacher_moved = self._step
        output = super()._generate_and_score_completions(inputs)
        if self.rollout.cross_entropy_weight:
            weights = demonstration_weights(rollouts, output["completion_mask"], self._mean)
            output["demonstration_weights"] = weights
        if self._teaches:
            output |= self._show_teacher(rollouts, output)
        if self._teaches_by_advantage:
            log_ratios = self._log_ratios(output)
            policy = output["advantages"][:, None] * self.policy_weight
            output["advantages"] = policy + log_ratios * self.distillation.weight
        if self.on_rollouts is not None:
            rollouts.advantages = _by_row(output["advantages"], output["completion_mask"])
            self.on_rollouts(self._everyones(rollouts), output)
        return output

    def _show_teacher(self, rollouts: Rollouts, output: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the loss needs of the teacher beyond TRL's tensors: its prompts, and the tokens it is asked about."""
        assert self.teacher is not None
        # A context sees whole groups, wherever they were sampled.
        first = self.accelerator.process_index * len(rollouts)
        prompts = self.teacher.prompts(self._everyones(rollouts), self._tokenizer)
        rollouts.teacher_prompts = prompts[first : first + len(rollouts)]
        device = output["completion_ids"].device
        ids = [torch.tensor(i, device=device) for i in self._teacher_prompt_ids(rollouts.teacher_prompts)]
        learnable = output["completion_mask"] * output.get("tool_mask", 1)
        distilled, counted = distilled_tokens(rollouts, learnable, self.distillation)
        weights = distillation_weights(
            distilled, counted, self.distillation, max_completion_tokens=self.max_completion_length, reduce=self._mean
        )
        active = distilled.any(dim=1)
        self.note("distill/active_fraction", active.sum().item(), len(active))
        shown: dict[str, Tensor] = {
            "distill_mask": distilled,
            "distill_weights": weights,
            "teacher_prompt_ids": pad(ids, self._tokenizer.pad_token_id, padding_side="left"),
            "teacher_prompt_mask": pad([torch.ones_like(i) for i in ids], 0, padding_side="left"),
        }
        if self.distillation.route == "failures":
            shown["advantages"] = output["advantages"].masked_fill(active, 0.0)
        if self.on_rollouts is not None and not self.state.global_step:  # who looks at the prompts does so at step 0
            sent = iter(TeacherRequest.of({**output, **shown}).sent())
            rollouts.sent_to_teacher = [next(sent) if taught else None for taught in active.tolist()]
        return shown

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before:
            return inputs
        if window := self._sortable_window():
            self._buffered_inputs = sorted_by_length(self._buffered_inputs, window, whole=self.has_policy_term)
            inputs = self._buffered_inputs[self._step % len(self._buffered_inputs)]
        if self._teaches and not self._teaches_by_advantage:
            assert self.teacher is not None
            for batch in self._buffered_inputs:
                batch[REQUEST] = TeacherRequest.of(batch)
            self.teacher.prepare([batch[REQUEST] for batch in self._buffered_inputs])
        return inputs

    def _sortable_window(self) -> int:
        """Micro-batches of one optimizer step among which rows may be exchanged without a change of its loss; 0: none.

        They may not where something is normalised over the rows of a micro-batch: the loss `bnpo`, a share of the
        tokens by entropy, an entropy bonus, the load-balancing loss of a mixture of experts.
        """
        args, generated = self.args, self._micro_batches_per_generation
        by_micro_batch = args.loss_type == "bnpo" or args.top_entropy_quantile < 1 or vars(args).get("entropy_coef")
        if self.has_policy_term and (by_micro_batch or self.aux_loss_enabled or vars(args).get("use_adaptive_entropy")):
            return 0
        window = min(args.gradient_accumulation_steps, generated)
        divides = generated % window == 0 and args.gradient_accumulation_steps % window == 0
        return window if divides and window > 1 and args.per_device_train_batch_size > 1 else 0

    # ---- the loss ----

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        start, terms = time.perf_counter(), []
        distilled, demonstrated = inputs.get("distill_mask"), inputs.get("demonstration_weights")
        if self._teaches_by_advantage:
            distilled = None
        said = None
        if distilled is not None and self._worthwhile(distilled):
            # Before the student's pass: its graph takes memory, and of a sharded model it refers to gathered parameters
            # that the teacher's would take the place of.
            said = self._ask_teacher(model, inputs)
        with captured_hidden(model) as captured:
            if self.has_policy_term:
                scaled = inputs["advantages"] * (1.0 if self._teaches_by_advantage else self.policy_weight)
                terms.append(super()._compute_loss(model, {**inputs, "advantages": scaled}))
        masks = [] if distilled is None else [distilled]
        masks += [] if demonstrated is None else [demonstrated > 0]
        # With several processes all make the pass that one of them needs, since it is a collective call.
        if masks and (self.accelerator.num_processes > 1 or any(mask.any() for mask in masks)):
            states = self._states(model, inputs, torch.stack(masks).any(dim=0), captured)
            # The weights are shares of what was sampled together, which this window has a part of.
            share = self._windows_per_generation
            if said is not None:
                terms.append(self.distillation.weight * share * self._distillation_loss(model, inputs, states, said))
            if demonstrated is not None and self._worthwhile(demonstrated > 0):
                terms.append(self.rollout.cross_entropy_weight * share * self._cross_entropy(model, inputs, states))
        if not terms:  # nothing to learn: a zero on the graph
            terms.append(next(p for p in self.model.parameters() if p.requires_grad).sum() * 0.0)
        self._note_seconds("time/loss_s", start)
        return sum(terms[1:], terms[0])

    def _worthwhile(self, mask: Tensor) -> bool:
        return self.accelerator.num_processes > 1 or bool(mask.any())

    def _states(
        self, model: nn.Module, inputs: Mapping[str, Any], mask: Bool[Tensor, "B T"], captured: list[Tensor]
    ) -> States:
        """The student's hidden states: of the pass that the policy gradient made, or of the rows in `mask` alone."""
        prompt_ids, ids, attention = inputs["prompt_ids"], inputs["completion_ids"], inputs["completion_mask"]
        if captured:
            groups = row_groups(inputs["prompt_mask"], attention, together=self.aux_loss_enabled)
            parts = [
                aligned(part, group.completion_tokens)
                for part, group in zip(captured[-len(groups) :], groups, strict=True)
            ]
            hidden = in_row_order(parts, groups, ids.size(1))
            return lambda tokens: hidden[tokens]
        rows = mask.any(dim=1)
        if not rows.any():
            rows[0] = True
        longest = max(int(attention[rows].sum(dim=1).max()), 1)
        with self.accelerator.autocast():
            completion = ids[rows][:, :longest], attention[rows][:, :longest]
            hidden = completion_hidden(model, prompt_ids[rows], inputs["prompt_mask"][rows], *completion)
        return lambda tokens: hidden[tokens[rows][:, :longest]]

    def _distillation_loss(
        self, model: nn.Module, inputs: Mapping[str, Any], states: States, said: losses.TeacherOutput
    ) -> Float[Tensor, ""]:
        """Sum over tokens of weight times divergence, from the student's hidden states."""
        settings, keep, head = self.distillation, inputs["distill_mask"], head_of(model)
        student, tokens, weights = states(keep), inputs["completion_ids"][keep], inputs["distill_weights"][keep]
        if settings.is_clip is not None and "old_per_token_logps" in inputs:
            now = losses.token_logps(student.detach(), head.at(self.temperature).detached(), tokens)
            weights = weights * losses.importance_weight(now, inputs["old_per_token_logps"][keep], settings.is_clip)
        temperature = said.temperature(settings.temperature or self.temperature)
        if settings.signal == "sampled_token":
            per_token = said.sampled_divergence(student, head.at(temperature), tokens, weights=weights)
        else:
            kind = replace(settings, temperature=temperature)
            per_token = said.divergence(student, head, kind, weights=weights)
        self._note_divergence(per_token.detach(), keep)
        if not self.has_policy_term and len(student):  # the policy gradient logs the entropy where it runs
            some = spread_tokens(keep, ENTROPY_TOKENS_PER_ROW)
            self.note("entropy", entropy_sum(states(some), head.at(self.temperature)), int(some.sum()))
        return (per_token * weights).sum()

    def _note_divergence(self, divergence: Float[Tensor, " N"], keep: Bool[Tensor, "B T"]) -> None:
        """Its mean, and apart from it the means at the first and at the last distilled token of completions.

        Args:
            divergence: of the distilled tokens, in row order.
            keep: which tokens these are.
        """
        self.note("distill/divergence", divergence.sum().item(), len(divergence))
        per_row = keep.sum(dim=1)
        ends = per_row.cumsum(dim=0)[per_row > 0]
        firsts = ends - per_row[per_row > 0]
        for name, places in (("first", firsts), ("last", ends - 1)):
            self.note(f"distill/divergence_{name}", divergence[places].sum().item(), len(places))

    def _ask_teacher(self, model: nn.Module, inputs: Mapping[str, Any]) -> losses.TeacherOutput:
        assert self.teacher is not None
        start = time.perf_counter()
        with self.accelerator.autocast():
            said = self.teacher.say(inputs.get(REQUEST) or TeacherRequest.of(inputs), model)
        self._note_seconds("time/teacher_s", start)
        return said

    @torch.no_grad()
    def _log_ratios(self, output: dict[str, Any]) -> Float[Tensor, "B T"]:
        """log q - log pi of the sampled tokens, 0 where there is no signal: distillation as an advantage."""
        assert self.teacher is not None
        mask = output["distill_mask"]
        log_ratios = torch.zeros(mask.shape, device=mask.device)
        tensors = {name: value for name, value in output.items() if isinstance(value, Tensor) and value.dim() > 0}
        rows_at_once = self.args.per_device_train_batch_size
        parts: list[tuple[Tensor, dict[str, Any]]] = []
        active = mask.any(dim=1).nonzero().squeeze(1)
        active = active[
            (output["teacher_prompt_mask"].sum(dim=1) + output["completion_mask"].sum(dim=1))[active].argsort()
        ]
        taken = list(active.split(rows_at_once)) if len(active) else []
        # A pass of a sharded model takes all processes: who has fewer rows goes through the first one once more.
        missing = self.most_of_any_process(len(taken)) - len(taken)
        for rows in [*taken, *[torch.zeros(1, dtype=torch.long, device=mask.device)] * missing]:
            part: dict[str, Any] = {name: value[rows] for name, value in tensors.items()}
            parts.append((rows, {**part, REQUEST: TeacherRequest.of(part)}))
        self.teacher.prepare([part[REQUEST] for _, part in parts])
        for rows, part in parts:
            keep, tokens = part["distill_mask"], part["completion_ids"][part["distill_mask"]]
            said = self._ask_teacher(self.model, part)
            temperature = said.temperature(self.temperature)
            with evaluating(self.model), self.accelerator.autocast():
                prompt = part["prompt_ids"], part["prompt_mask"]
                hidden = completion_hidden(self.model, *prompt, part["completion_ids"], part["completion_mask"])
            ours = losses.token_logps(hidden[keep], head_of(self.model).at(temperature), tokens)
            theirs = said.token_logps(tokens, temperature)
            values = torch.zeros(keep.shape, device=mask.device)
            values[keep] = torch.where(theirs.isfinite(), theirs - ours, 0.0).float()
            log_ratios[rows] = values
        self._note_divergence(-log_ratios[mask], mask)
        return log_ratios

    def _cross_entropy(self, model: nn.Module, inputs: Mapping[str, Any], states: States) -> Float[Tensor, ""]:
        """Weighted sum of the negative log-probabilities of the demonstrations' tokens, at temperature 1."""
        tokens = inputs["demonstration_weights"] > 0
        weights = inputs["demonstration_weights"][tokens]
        logps = losses.token_logps(states(tokens), head_of(model), inputs["completion_ids"][tokens], weights=weights)
        self.note("cross_entropy", -logps.detach().sum().item(), len(logps))
        return -(logps * weights).sum()


class _AfterStep(TrainerCallback):
    """Keeps a teacher in step with the training."""

    def __init__(self, teacher: BaseTeacher) -> None:
        self.teacher = teacher

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.teacher.after_step(state.global_step)


def _check_columns(teacher: BaseTeacher | None, dataset: Any) -> None:
    """Raises UserError when the teacher's context needs a column that the data does not have."""
    names = getattr(dataset, "column_names", None)
    if teacher is not None and names and hasattr(dataset, "__getitem__"):
        teacher.check_columns({name: dataset[name] for name in names if name != "prompt"})


def _by_row(advantages: Tensor, mask: Tensor) -> list[float]:
    """One advantage for each row: the mean over its tokens where each token has its own."""
    if advantages.dim() > 1:
        advantages = (advantages * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return advantages.tolist()
