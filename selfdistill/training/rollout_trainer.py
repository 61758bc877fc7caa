"""TRL's trainer with what is known of a batch on one object: who writes the completions, and who judges them."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer

from selfdistill.config.settings import RolloutSource
from selfdistill.errors import UserError
from selfdistill.models.structure import has_dropout, is_reference
from selfdistill.rewards.adapter import ROLLOUTS
from selfdistill.rollout import Prompt, Rollouts, text_of
from selfdistill.teachers.interface import REQUEST, BaseTeacher
from selfdistill.training import checkpoints
from selfdistill.training.demonstrations import demonstrated_groups, demonstration_ids
from selfdistill.training.metrics import Means


def no_reward(completions: list, **_: Any) -> list[float]:
    """Stands where TRL insists on a reward and the run has none."""
    return [0.0] * len(completions)


class RolloutTrainer(GRPOTrainer):
    """TRL's GRPOTrainer, whose completions may come from elsewhere and whose rewards may give feedback.

    What one of TRL's hooks learns of a batch goes onto its `Rollouts`, where the later hooks find it.

    Attributes:
        teacher: who may sample in the student's place, and whose state is kept in checkpoints.
        rollout: where completions come from.
        rewards: the reward functions; empty where TRL is given one that scores nothing.
    """

    # TRL's own attributes, with the types that they have once it is constructed.
    args: GRPOConfig
    model: nn.Module
    train_dataset: Dataset
    num_generations: int
    num_generations_eval: int
    max_completion_length: int
    shuffle_dataset: bool
    aux_loss_enabled: bool

    teacher: BaseTeacher | None
    rollout: RolloutSource
    rewards: list[Any]
    _rollouts: Rollouts
    _means: dict[str, Means]

    def _check_rollout(self, given: dict[str, Any]) -> None:
        if self.rollout.from_teacher:
            self._generating()  # refuses here if the teacher cannot sample
        if self.rollout.from_teacher or self.rollout.on_policy_fraction < 1:
            for several_turns in ("tools", "environment_factory", "rollout_func"):
                if given.get(several_turns):
                    raise UserError(f"rollout: {several_turns} goes with the student's own completions only.")

    @property
    def _windows_per_generation(self) -> float:
        """How many optimizer steps the rollouts generated together are spread over."""
        return self._micro_batches_per_generation / self.current_gradient_accumulation_steps

    @property
    def _micro_batches_per_generation(self) -> int:
        assert self.args.steps_per_generation is not None  # GRPOConfig fills it in
        return self.args.steps_per_generation

    @property
    def _prompts_per_generation(self) -> int:
        """Of all processes."""
        assert self.args.generation_batch_size is not None  # GRPOConfig fills it in
        return self.args.generation_batch_size // self.num_generations

    # ---- completions ----

    def _generate_single_turn(
        self, prompt_ids: list, images: Any, multimodal_fields: Any, num_generations: int, *args: Any, **kwargs: Any
    ) -> Any:
        start, rollouts, training = time.perf_counter(), self._rollouts, self.model.training
        asked: list[list[int]] = prompt_ids
        generating: AbstractContextManager[None] = nullcontext()
        demonstrated = [False] * len(prompt_ids)
        if not rollouts.prompt_ids:  # later turns, after a tool was called, come with a part of the rows
            rollouts.prompt_ids = prompt_ids
            if training:
                demonstrated = rollouts.demonstrated = self._demonstrated(len(prompt_ids), num_generations)
        if training and self.rollout.from_teacher:
            asked, generating = self._as_the_teacher_is_asked(rollouts), self._generating()
        sampled = [i for i, taken_from_data in enumerate(demonstrated) if not taken_from_data]
        written: list[list[int]] = []
        logprobs = None
        if sampled:
            with generating:
                written, logprobs = super()._generate_single_turn(
                    [asked[i] for i in sampled], images, multimodal_fields, num_generations, *args, **kwargs
                )
        if len(sampled) < len(prompt_ids) or (training and self.rollout.from_teacher):
            by_row = dict(zip(sampled, written, strict=True))
            known = {} if logprobs is None or self.rollout.from_teacher else dict(zip(sampled, logprobs, strict=True))
            written = [by_row[i] if i in by_row else self._demonstration(i) for i in range(len(prompt_ids))]
            # vLLM's importance correction wants a value for every token; it takes None for a ratio of 1.
            unknown = [[None] * len(ids) for ids in written]
            logprobs = [known.get(i, unknown[i]) for i in range(len(written))] if self.use_vllm else None
        self._note_seconds("time/generate_s", start)
        return written, logprobs

    def _demonstrated(self, count: int, num_generations: int) -> list[bool]:
        fraction, first = self.rollout.on_policy_fraction, self.accelerator.process_index * count
        if fraction == 1:
            return [False] * count
        groups = range(first // num_generations, (first + count - 1) // num_generations + 1)
        chosen = demonstrated_groups(fraction, groups, seed=self.args.seed, micro_batch=self._step)
        return [chosen[(first + i) // num_generations - groups.start] for i in range(count)]

    def _demonstration(self, index: int) -> list[int]:
        row = {name: values[index] for name, values in self._rollouts.columns.items()}
        field = self.rollout.demonstration_field
        return demonstration_ids(row, field, self._tokenizer, self.max_completion_length)

    def _generating(self) -> AbstractContextManager[None]:
        return BaseTeacher().generating() if self.teacher is None else self.teacher.generating()

    def _as_the_teacher_is_asked(self, rollouts: Rollouts) -> list[list[int]]:
        """The teacher's prompts as token ids; the student's own where the teacher is shown nothing."""
        assert self.teacher is not None
        prompts = self.teacher.prompts(rollouts, self._tokenizer)
        ids = self._prompt_ids(prompts)
        return [own if p is None else i for own, p, i in zip(rollouts.prompt_ids, prompts, ids, strict=True)]

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        # Without gradient TRL scores the whole batch: by the policy (old log-probabilities), then by the reference.
        # It does so at the sampling temperature, and not for completions that it masks.
        if not torch.is_grad_enabled() and self._rollouts.policy_logps is None and model is self.model:
            as_scored = self.temperature == 1.0 and not self.mask_truncated_completions
            if as_scored and not (model.training and has_dropout(model)) and not is_reference(model):
                self._rollouts.policy_logps = result[0]
        return result

    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, completion_ids_list: list) -> Tensor:
        start, rollouts = time.perf_counter(), self._rollouts
        rollouts.completions = [text_of(completion) for completion in completions]
        rollouts.completion_ids = completion_ids_list
        inputs = [{**row, ROLLOUTS: rollouts} for row in inputs]
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # of all processes
        if self.rewards:
            first = self.accelerator.process_index * len(prompts)
            rollouts.scores = _weighted(rewards[first : first + len(prompts)], self.reward_weights)
        self._note_seconds("time/reward_s", start)
        return rewards

    def _prompt_ids(self, prompts: Sequence[Prompt | None]) -> list[list[int]]:
        """Prompts tokenised as the student's are; a missing one stands as one padding token."""
        filled = [i for i, prompt in enumerate(prompts) if prompt is not None]
        ids = self._tokenize_prompts([prompts[i] for i in filled])[0] if filled else []
        by_row = dict(zip(filled, ids, strict=True))
        return [by_row.get(i, [self._tokenizer.pad_token_id]) for i in range(len(prompts))]

    def _everyones(self, rollouts: Rollouts) -> Rollouts:
        return rollouts.gathered(gather_object) if self.accelerator.num_processes > 1 else rollouts

    # ---- what is logged ----

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def note(self, name: str, total: float, count: float = 1.0) -> None:
        """Adds to a metric of the next logged step: the sum of `count` values. Processes are put together there."""
        self._means[self._mode].add(name, total, count)

    def _note_seconds(self, name: str, start: float) -> None:
        self.note(name, time.perf_counter() - start)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = self._metrics[self._mode]
        if not self.rewards:  # those of `no_reward` would read as if something had gone wrong
            for name in [name for name in metrics if "reward" in name]:
                del metrics[name]
        for name, value in self._means[self._mode].take(self.accelerator).items():
            metrics[name] = [value]
        super().log(logs, start_time)

    def report_evaluation(self, metrics: dict[str, float]) -> None:
        """Tells the callbacks of an evaluation that was made outside of TRL's loop, as they are told of TRL's own."""
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)

    # ---- checkpoints ----

    def save_checkpoint(self) -> None:
        """Saves a checkpoint now, as the training does at its own times."""
        self._save_checkpoint(self.model, trial=None)
        self.callback_handler.on_save(self.args, self.state, self.control)

    def unused_rollouts(self) -> list[dict[str, Tensor]] | None:
        """The micro-batches that were sampled together and not all learned from yet, without what can be made again."""
        batches = self._buffered_inputs
        return batches and [{name: value for name, value in batch.items() if name != REQUEST} for batch in batches]

    def _get_train_sampler(self, dataset: Any = None) -> checkpoints.ResumableSampler:
        return checkpoints.ResumableSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self._prompts_per_generation,
            repeat_count=self.num_iterations * self._micro_batches_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        checkpoints.save(Path(self._get_output_dir(trial=trial)) / name, self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        checkpoints.restore(Path(resume_from_checkpoint), self)


def _weighted(rewards: Float[Tensor, "B F"], weights: Float[Tensor, " F"]) -> list[float | None]:
    """Weighted sum of the rewards that apply to each completion; None where none does."""
    rows = []
    for row in rewards.tolist():
        applicable = [w * r for w, r in zip(weights.tolist(), row, strict=True) if r == r]
        rows.append(sum(applicable) if applicable else None)
    return rows
