"""The distillation term: what a teacher needs to see, and its divergence from the student's hidden states."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from selfdistill import losses
from selfdistill.models.structure import Head, completion_hidden, evaluating, head_of
from selfdistill.rollout import Rollouts
from selfdistill.teachers.context import SCORE_TOLERANCE
from selfdistill.teachers.server.scoring import ScoreRequest
from selfdistill.teachers.server.top_tokens import TopTokens
from selfdistill.training.settings import Distillation

# How many tokens the entropy is estimated from where no policy gradient computes it: enough for an alarm, and few beside
# what the loss projects. So many at a time are projected, so that no tensor of tokens x vocabulary is held.
ENTROPY_SAMPLE_TOKENS, ENTROPY_BLOCK_TOKENS = 64, 16
# The key under which a micro-batch carries what a served teacher is asked about it. Checkpoints leave it out.
SCORE_REQUEST = "score_request"

# Hidden states (N, H) of the tokens in a mask (B, T), in row order.
States = Callable[[Tensor], Tensor]
# One teacher pass: hidden states (N, H) of the distilled tokens, and the head that makes logits of them.
View = tuple[Tensor, Head]


class Distiller:
    """Knows the teacher and the settings; the trainer asks it for inputs once per batch and for a loss per micro-batch.

    Args:
        teacher: a local `Teacher`, or a served one (it has `score`).
        settings: what is distilled.
        trainer: gives temperature, padding, accelerator and the log of metrics.
    """

    def __init__(self, teacher: Any, settings: Distillation, trainer: Any) -> None:
        self.teacher, self.settings, self.trainer = teacher, settings, trainer
        self.served = hasattr(teacher, "score")

    # ---- once per batch of rollouts ----

    def inputs(self, rollouts: Rollouts, prompts: list, prompt_ids: list, output: dict[str, Any]) -> dict[str, Tensor]:
        """What the loss needs beyond TRL's tensors.

        Args:
            prompts: what the teacher is shown, one per rollout; None where there is no signal.
            prompt_ids: the same as token ids; anything where there is no signal.
            output: TRL's tensors of the batch.

        Returns:
            `distill_mask` (B, T), `distill_weights` (B, T) and the teacher's prompt (B, P) with its mask.
        """
        s, device = self.settings, output["completion_ids"].device
        mask = output["completion_mask"] * output.get("tool_mask", 1)
        mask = mask * (torch.arange(mask.size(1), device=device) >= s.skip_tokens)
        signal = [prompt is not None for prompt in prompts]
        if s.route == "failures":
            signal = [a and self._failed(score) for a, score in zip(signal, rollouts.scores, strict=True)]
        active = torch.tensor(signal, device=device) & mask.any(dim=1)
        self._log("distill/active_fraction", active.float().mean().item())
        extra: dict[str, Tensor] = {
            "distill_weights": self._weights(mask, active),
            "distill_mask": mask.bool() & active[:, None],
        }
        extra["teacher_prompt_ids"], extra["teacher_prompt_mask"] = _left_padded(
            prompt_ids, self.trainer._tokenizer.pad_token_id, device
        )
        return extra

    def _failed(self, score: float | None) -> bool:
        return score is None or score < self.settings.success_threshold - SCORE_TOLERANCE

    def _weights(self, mask: Tensor, active: Tensor) -> Tensor:
        """Each token's weight (B, T): summed over an accumulation window they make the mean that is asked for."""
        s, trainer = self.settings, self.trainer
        kind = {"row_active": active, "count_inactive_rows": s.count_inactive_rows}
        everywhere = trainer.accelerator.reduce(losses.aggregation_normalizer(mask, s.aggregation, **kind), "mean")
        weights = losses.aggregation_weights(
            mask, s.aggregation, **kind, max_completion_tokens=trainer.max_completion_length, normalizer=everywhere
        )
        return weights * trainer.windows_per_generation

    def prefetch(self, batches: list[dict[str, Any]]) -> None:
        """Asks a served teacher about micro-batches to come, in the order in which they are learnt from.

        It scores the later ones while the student learns from the first.
        """
        if self.served:
            for batch in batches:
                batch[SCORE_REQUEST] = self._request(batch)
            self.teacher.prepare([batch[SCORE_REQUEST] for batch in batches])

    def _request(self, inputs: dict[str, Any]) -> ScoreRequest:
        rows = inputs["distill_mask"].any(dim=1)
        names = ("teacher_prompt_ids", "teacher_prompt_mask", "completion_ids", "completion_mask")
        ids, mask, completions, completion_mask = (inputs[name][rows] for name in names)
        keep = list(inputs["distill_mask"][rows].cpu())
        return ScoreRequest(_unpadded(ids, mask), _unpadded(completions, completion_mask), keep)

    def _said(self, inputs: dict[str, Any]) -> TopTokens:
        """What the server says of the distilled tokens."""
        start = time.perf_counter()
        said = self.teacher.say(inputs.get(SCORE_REQUEST) or self._request(inputs))
        self._log("time/teacher_s", time.perf_counter() - start)
        return said.to(inputs["distill_mask"].device)

    @torch.no_grad()
    def token_advantages(self, model: Any, output: dict[str, Any], rows_at_once: int) -> Tensor:
        """log q - log pi of the sampled tokens (B, T), 0 where there is no signal: distillation as an advantage."""
        mask = output["distill_mask"]
        advantages = torch.zeros(mask.shape, device=mask.device)
        parts = [
            (rows, {k: v[rows] for k, v in output.items() if isinstance(v, Tensor) and v.dim() > 0})
            for rows in mask.any(dim=1).nonzero().squeeze(1).split(rows_at_once)
        ]
        self.prefetch([part for _, part in parts])
        for rows, part in parts:
            keep, tokens = part["distill_mask"], part["completion_ids"][part["distill_mask"]]
            with evaluating(model), self.trainer.accelerator.autocast():
                hidden = completion_hidden(
                    model, part["prompt_ids"], part["prompt_mask"], part["completion_ids"], part["completion_mask"]
                )
            ours = token_logps(hidden[keep], tokens, head_of(model), self.trainer.temperature)
            if self.served:
                theirs = self._said(part).sampled_logps
            else:
                teacher, head = self._views(model, part)[0]
                theirs = token_logps(teacher, tokens, head, self.trainer.temperature)
            values = torch.zeros(keep.shape, device=mask.device)
            values[keep] = torch.where(theirs.isfinite(), theirs - ours, 0.0).float()
            advantages[rows] = values
        self._log("distill/divergence", -advantages.sum().item() / max(int(mask.sum()), 1))
        return advantages

    # ---- once per micro-batch ----

    def loss(self, model: Any, inputs: dict[str, Any], states: States) -> Tensor:
        """Sum over tokens of weight times divergence, from the student's hidden states."""
        s, keep = self.settings, inputs["distill_mask"]
        student, tokens, weights = states(keep), inputs["completion_ids"][keep], inputs["distill_weights"][keep]
        head, sampling = head_of(model), self.trainer.temperature
        if s.is_clip is not None and "old_per_token_logps" in inputs:
            now = token_logps(student.detach(), tokens, head, sampling)
            weights = weights * losses.importance_weight(now, inputs["old_per_token_logps"][keep], s.is_clip)
        if self.served:
            per_token, shown = self._from_server(student, tokens, head, self._said(inputs), weights)
        else:
            start = time.perf_counter()
            views = self._views(model, inputs)
            self._log("time/teacher_s", time.perf_counter() - start)
            per_token, shown = self._between(student, tokens, head, views, weights)
        self._log("distill/divergence", shown.detach().sum().item() / max(len(tokens), 1))
        if not self.trainer.has_policy_term and len(student):  # the policy gradient logs the entropy where it runs
            self._log("entropy", sampled_entropy(student, head, sampling))
        return (per_token * weights).sum()

    def _views(self, model: Any, inputs: dict[str, Any]) -> list[View]:
        """The teacher's passes over the distilled rows, in evaluation mode and without gradient."""
        rows = inputs["distill_mask"].any(dim=1)
        if not rows.any():  # no token to score, but other processes may wait for this pass
            rows = torch.ones_like(rows)
        longest = int(inputs["completion_mask"][rows].sum(dim=1).max())
        ids, mask = inputs["completion_ids"][rows][:, :longest], inputs["completion_mask"][rows][:, :longest]
        keep = inputs["distill_mask"][rows][:, :longest]
        views = []
        for module in self.teacher.weights.views():
            teacher = model if module is None else module
            with evaluating(teacher), self.trainer.accelerator.autocast():
                prompt = inputs["teacher_prompt_ids"][rows], inputs["teacher_prompt_mask"][rows]
                hidden = completion_hidden(teacher, *prompt, ids, mask)[keep]
            # Detached inside of the loop: the student's parameters are about to be put back into the module.
            views.append((hidden, head_of(teacher).detached()))
        return views

    def _between(
        self, student: Tensor, tokens: Tensor, head: Head, views: list[View], weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Per token (N,): the loss, and the divergence to show (the sampled-token loss's own value means nothing)."""
        s, (teacher, theirs) = self.settings, views[0]
        temperature = s.temperature or self.trainer.temperature
        if s.signal == "sampled_token":
            ours = token_logps(student, tokens, head, temperature, weights)
            logps = token_logps(teacher, tokens, theirs, temperature)
            return losses.sampled_token_loss(ours, logps), ours - logps
        # Models of one family share a tokenizer and pad their heads to different sizes: the padding is left out.
        size = min(len(head.weight), len(theirs.weight))
        head, theirs = head.narrowed(size), theirs.narrowed(size)
        second = None
        if len(views) > 1:
            second = (views[1][0], views[1][1].narrowed(size).weight, self.teacher.weights.mix_coef)
        per_token = losses.chunked_token_divergence(
            student, teacher, head.weight, theirs.weight, alpha=s.alpha, top_k=s.top_k, tail=s.tail,
            temperature=temperature, pointwise_clip=s.pointwise_clip, jsd_normalize=s.jsd_normalize, weights=weights,
            student_bias=head.bias, teacher_bias=theirs.bias, logit_scale=(head.logit_scale, theirs.logit_scale),
            soft_cap=(head.soft_cap, theirs.soft_cap), mixture=second,
        )  # fmt: skip
        return per_token, per_token

    def _from_server(
        self, student: Tensor, tokens: Tensor, head: Head, said: TopTokens, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `_between`, over the tokens whose log-probabilities the server returned; both sides at temperature 1."""
        s, logps = self.settings, said.sampled_logps
        if s.signal == "sampled_token":
            ours = token_logps(student, tokens, head, 1.0, weights)
            return losses.sampled_token_loss(ours, logps), torch.where(logps.isfinite(), ours - logps, 0.0)
        per_token = losses.chunked_support_divergence(
            student, head.weight, said.ids, said.logps, alpha=s.alpha, tail=s.tail, pointwise_clip=s.pointwise_clip, jsd_normalize=s.jsd_normalize, weights=weights, student_bias=head.bias,
            logit_scale=head.logit_scale, soft_cap=head.soft_cap,
        )  # fmt: skip
        return per_token, per_token

    def _log(self, name: str, value: float) -> None:
        self.trainer._metrics["train"][name].append(value)


def token_logps(hidden: Tensor, ids: Tensor, head: Head, temperature: Any, weights: Tensor | None = None) -> Tensor:
    """log p of the tokens (N,) from the states that predict them (N, H)."""
    return losses.chunked_token_logps(
        hidden, head.weight, ids, temperature=temperature, weights=weights, bias=head.bias,
        logit_scale=head.logit_scale, soft_cap=head.soft_cap,
    )  # fmt: skip


@torch.no_grad()
def sampled_entropy(hidden: Tensor, head: Head, temperature: Any) -> float:
    """Mean entropy in nats of the predictions from some of the hidden states (N, H), evenly spread; N at least 1."""
    if len(hidden) > ENTROPY_SAMPLE_TOKENS:
        hidden = hidden[torch.linspace(0, len(hidden) - 1, ENTROPY_SAMPLE_TOKENS, device=hidden.device).long()]
    total = hidden.new_zeros((), dtype=torch.float32)
    for block in hidden.split(ENTROPY_BLOCK_TOKENS):
        total += torch.special.entr(torch.softmax(head.logits(block) / temperature, dim=-1)).sum()
    return total.item() / len(hidden)


def _left_padded(rows: list[list[int]], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = [[padding] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[keep.bool()].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
