"""TRL's trainer with what is known of a batch on one object: who writes the completions, and who judges them."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import ceil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from selfdistill.config.settings import RolloutSource
from selfdistill.errors import UserError
from selfdistill.files import disk_space
from selfdistill.models.card import Card, base_of, finish_folder, write_card
from selfdistill.models.row_groups import in_row_order, row_groups
from selfdistill.models.sharding import generate_in_step, share_tied
from selfdistill.models.structure import has_dropout, inner_model, is_reference
from selfdistill.rewards.adapter import ROLLOUTS
from selfdistill.rollout import Prompt, Rollouts, shown_in, text_of
from selfdistill.teachers.interface import REQUEST, BaseTeacher
from selfdistill.teachers.language import Speaker
from selfdistill.tokens import encode_prompts
from selfdistill.training import checkpoints
from selfdistill.training.demonstrations import demonstrated_groups, demonstration_ids
from selfdistill.training.metrics import Means, greatest_of_all_processes
from selfdistill.training.trl_trainer import GRPOConfig, GRPOTrainer


def no_reward(completions: list, **_: Any) -> list[float]:
    """Stands where TRL insists on a reward and the run has none."""
    return [0.0] * len(completions)


class RolloutTrainer(GRPOTrainer):
    """TRL's GRPOTrainer, whose completions may come from elsewhere and whose rewards may give feedback.

    What one of TRL's hooks learns of a batch goes onto its `Rollouts`, where the later hooks find it.

    Attributes:
        teacher: who may sample in the student's place, and whose state is kept in checkpoints.
        rollout: where completions come from.
        card: what the page of a saved model says; None for what the trainer knows by itself.
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
    chat_template_kwargs: dict[str, Any]
    tools: list[Any]
    _env_tools: dict[str | None, list[Any]]
    _batch_environments: list[Any]
    reward_funcs: list[Any]
    reward_func_names: list[str]
    reward_processing_classes: list[Any]

    teacher: BaseTeacher | None
    card: Card | None
    rollout: RolloutSource
    rewards: list[Any]
    _rollouts: Rollouts
    _means: dict[str, Means]
    _has_shards = False
    on_random_state_loaded: Callable[[], object] = staticmethod(lambda: None)
    teacher_moved: int | None = None  # the micro-batch before whose rollouts the teacher was last told to move

    def _check_rollout(self, given: dict[str, Any]) -> None:
        if self.rollout.from_teacher:
            self._generating()  # refuses here if the teacher cannot sample
        if self.rollout.from_teacher or self.rollout.on_policy_fraction < 1:
            for several_turns in ("tools", "environment_factory", "rollout_func"):
                if given.get(several_turns):
                    raise UserError(f"rollout: {several_turns} goes with the student's own completions only.")

    def _take_environments_rewards(self) -> None:
        """Counts what TRL found in environments, which may have a `get_reward`, among the rewards."""
        given = len(self.rewards) or 1
        of_environments = self.reward_funcs[given:]
        if of_environments and not self.rewards:  # what stood where TRL insists on a reward
            for found in (self.reward_funcs, self.reward_func_names, self.reward_processing_classes):
                del found[0]
            self.reward_weights = self.reward_weights[1:]
        self.rewards = [*self.rewards, *of_environments]

    @property
    def _windows_per_generation(self) -> float:
        """How many windows like the current one the rollouts generated together are spread over; each is one optimizer
        step, and the last one of an epoch may have fewer micro-batches than the others."""
        return self._micro_batches_per_generation / self.current_gradient_accumulation_steps

    @property
    def planned_steps(self) -> int:
        """Optimizer steps of the whole training: as configured, or as many as the epochs take."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        generations = len(self.train_dataset) // self._prompts_per_generation
        batches = generations * self._micro_batches_per_generation * self.num_iterations
        return ceil(self.args.num_train_epochs * ceil(batches / self.args.gradient_accumulation_steps))

    @property
    def _micro_batches_per_generation(self) -> int:
        assert self.args.steps_per_generation is not None  # GRPOConfig fills it in
        return self.args.steps_per_generation

    @property
    def _prompts_per_generation(self) -> int:
        """Of all processes."""
        assert self.args.generation_batch_size is not None  # GRPOConfig fills it in
        return self.args.generation_batch_size // self.num_generations

    # ---- how the student is asked and ends ----

    def _student(self) -> Speaker:
        """The student as it is asked and ends; whether in a chat is told by the first row of the data."""
        ends = inner_model(self.accelerator.unwrap_model(self.model)).generation_config.eos_token_id
        first: Any = next(iter(self.train_dataset), {"prompt": ""})
        return Speaker(self._tokenizer, ends, self.chat_template_kwargs, not isinstance(first["prompt"], str))

    def _stop_at(self, ends: Sequence[int]) -> None:
        """Lets completions end with each of these tokens, here and wherever the model's generation settings are read.

        A template's end of turn need not be among the ends that the model declares: Gemma's base models know <eos>
        alone. Demonstrations end with it, and so do completions.
        """
        missing = [end for end in ends if end not in self.eos_token_ids]
        if not missing:
            return
        self.eos_token_ids = [*self.eos_token_ids, *missing]
        inner_model(self.accelerator.unwrap_model(self.model)).generation_config.eos_token_id = self.eos_token_ids
        if self.use_vllm:
            self.vllm_generation.generation_kwargs["stop_token_ids"] = self.eos_token_ids
        else:
            self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = self.eos_token_ids

    # ---- completions ----

    def _generate(self, prompts: list) -> Any:
        """All turns, or those of the user's own rollout function: either knows what the student was asked first."""
        generated = super()._generate(prompts)
        self._rollouts.prompt_ids = generated[0]
        return generated

    def _generate_single_turn(
        self, prompt_ids: list, images: Any, multimodal_fields: Any, num_generations: int, *args: Any, **kwargs: Any
    ) -> Any:
        start, rollouts, training = time.perf_counter(), self._rollouts, self.model.training
        asked: list[list[int]] = prompt_ids
        generating: AbstractContextManager[None] = nullcontext()
        demonstrated = [False] * len(prompt_ids)
        # Later turns, after a tool was called, come with a part of the rows; then all are the student's own.
        if training and self.rollout.on_policy_fraction < 1:
            demonstrated = rollouts.demonstrated = self._demonstrated(len(prompt_ids), num_generations)
        if training and self.rollout.from_teacher:
            asked, generating = self._as_the_teacher_is_asked(rollouts, prompt_ids), self._generating()
        sampled = self._in_step([i for i, taken in enumerate(demonstrated) if not taken], len(prompt_ids))
        written: list[list[int]] = []
        logprobs = None
        if sampled:
            with generating:
                written, logprobs = super()._generate_single_turn(
                    [asked[i] for i in sampled], images, multimodal_fields, num_generations, *args, **kwargs
                )
        if any(demonstrated) or (training and self.rollout.from_teacher):
            by_row = dict(zip(sampled, written, strict=True))
            known = {} if logprobs is None or self.rollout.from_teacher else dict(zip(sampled, logprobs, strict=True))
            written = [self._demonstration(i) if taken else by_row[i] for i, taken in enumerate(demonstrated)]
            # vLLM's importance correction wants a value for every token; it takes None for a ratio of 1.
            unknown = [[None] * len(ids) for ids in written]
            logprobs = None
            if self.use_vllm:
                logprobs = [unknown[i] if taken else known.get(i, unknown[i]) for i, taken in enumerate(demonstrated)]
        self._note_seconds("time/generate_s", start)
        return written, logprobs

    def _in_step(self, wanted: list[int], count: int) -> list[int]:
        """The rows of `count` to sample, so that this process takes part wherever another one samples.

        A pass of a sharded model takes all processes, and vLLM may serve several at once, with as many rows from each.
        What is sampled beyond the wanted rows is thrown away.
        """
        if self.rollout.on_policy_fraction == 1 or not self.most_of_any_process(len(wanted)):
            return wanted
        together = self.use_vllm and self.accelerator.num_processes > 1
        return list(range(count)) if together else wanted or [0]

    def most_of_any_process(self, count: int) -> int:
        """The largest of the processes' numbers. A collective call."""
        return greatest_of_all_processes(count, self.args)

    def _demonstrated(self, count: int, num_generations: int) -> list[bool]:
        fraction, first = self.rollout.on_policy_fraction, self.accelerator.process_index * count
        groups = range(first // num_generations, (first + count - 1) // num_generations + 1)
        chosen = demonstrated_groups(fraction, groups, seed=self.args.seed, micro_batch=self._step)
        return [chosen[(first + i) // num_generations - groups.start] for i in range(count)]

    def _demonstration(self, index: int) -> list[int]:
        columns, field = self._rollouts.columns, self.rollout.demonstration_field
        row = {name: values[index] for name, values in columns.items()}
        row["prompt"] = self._rollouts.prompts[index]
        if field in columns:
            row[field] = shown_in(columns, field)[index]
        return demonstration_ids(row, field, self._tokenizer, self.max_completion_length, self.chat_template_kwargs)

    def _generating(self) -> AbstractContextManager[None]:
        return BaseTeacher().generating() if self.teacher is None else self.teacher.generating()

    def _as_the_teacher_is_asked(self, rollouts: Rollouts, prompt_ids: list[list[int]]) -> list[list[int]]:
        """The teacher's prompts as token ids; the student's own where the teacher is shown nothing."""
        assert self.teacher is not None
        prompts = self.teacher.prompts(rollouts, self._tokenizer)
        ids = self._teacher_prompt_ids(prompts)
        return [own if p is None else i for own, p, i in zip(prompt_ids, prompts, ids, strict=True)]

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        result = self._score_in_groups(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        # Without gradient TRL scores the whole batch: by the policy (old log-probabilities), then by the reference.
        # It does so at the sampling temperature, and not for completions that it masks.
        if not torch.is_grad_enabled() and self._rollouts.policy_logps is None and model is self.model:
            as_scored = self.temperature == 1.0 and not self.mask_truncated_completions
            if as_scored and not (model.training and has_dropout(model)) and not is_reference(model):
                self._rollouts.policy_logps = result[0]
        return result

    def _score_in_groups(
        self,
        model: Any,
        ids: Int[Tensor, "B S"],
        mask: Int[Tensor, "B S"],
        completion_tokens: int,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's pass, without most of its padding: TRL pads every micro-batch to the longest prompt and to the longest
        completion of all that are sampled together. With images the rows stay as they are."""
        score = super()._get_per_token_logps_and_entropies
        given = {name: value for name, value in kwargs.items() if value is not None}
        if given.keys() - {"compute_entropy", "compute_aux_loss"}:
            return score(model, ids, mask, completion_tokens, batch_size, **kwargs)  # type: ignore[no-any-return]
        prompt_tokens, found = ids.size(1) - completion_tokens, []
        one_number_for_all = bool(given.get("compute_aux_loss"))
        groups = row_groups(
            mask[:, :prompt_tokens], mask[:, prompt_tokens:], most_rows=batch_size, together=one_number_for_all
        )
        for group in groups:
            columns = slice(prompt_tokens - group.prompt_tokens, prompt_tokens + group.completion_tokens)
            rows = ids[group.rows, columns], mask[group.rows, columns]
            found.append(score(model, *rows, group.completion_tokens, **given))
        logps, entropies, aux_losses = zip(*found, strict=True)
        return (
            in_row_order(logps, groups, completion_tokens),
            None if entropies[0] is None else in_row_order(entropies, groups, completion_tokens),
            None if aux_losses[0] is None else torch.stack(aux_losses).mean(),
        )

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

    def _tokenize_prompts(self, prompts: list) -> Any:
        if self._is_vlm:
            return super()._tokenize_prompts(prompts)
        if self.environment_factories is None:
            return self._encode(prompts, self.chat_template_kwargs), None, {}
        tools = [self._env_tools[name] or None for name in self._batch_environments]  # each has its own
        asked = zip(prompts, tools, strict=True)
        return [self._encode([p], {**self.chat_template_kwargs, "tools": t})[0] for p, t in asked], None, {}

    def _encode(self, prompts: Sequence[Prompt], template_kwargs: Mapping[str, Any]) -> list[list[int]]:
        # `or None`: some templates write about tools where there is an empty list of them.
        options = {"tools": self.tools or None, "chat_template": self.chat_template, **template_kwargs}
        return encode_prompts(self._tokenizer, prompts, options)

    def _teacher_prompt_ids(self, prompts: Sequence[Prompt | None]) -> list[list[int]]:
        """Prompts tokenised as the teacher is asked; a missing one stands as one padding token."""
        teacher = BaseTeacher() if self.teacher is None else self.teacher
        filled = [i for i, prompt in enumerate(prompts) if prompt is not None]
        kwargs = teacher.template_kwargs(self.chat_template_kwargs)
        ids = self._encode([prompt for prompt in prompts if prompt is not None], kwargs)
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

    # ---- a student that is divided among the processes ----

    @property
    def sharded(self) -> bool:
        """Whether FSDP or ZeRO-3 divides the student's parameters among the processes."""
        return self.is_fsdp_enabled or is_deepspeed_zero3_enabled()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """FSDP2 shards the student here, and a checkpoint of it is loaded here."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._take_shards()
        if self.is_deepspeed_enabled and resume_from_checkpoint is not None:  # DeepSpeed has loaded the student itself
            checkpoints.restore(Path(resume_from_checkpoint), self)
        return prepared

    def _take_shards(self) -> None:
        """Attaches the teacher to a student that FSDP2 has sharded by now; does nothing the second time."""
        if not isinstance(self.model, FSDPModule) or self._has_shards:
            return
        self._has_shards = True
        generate_in_step(self.model)
        if self.teacher is not None:
            self.teacher.attach(self.model, self._tokenizer, sharded=True)

    # ---- checkpoints ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves whole weights, also where the checkpoints of a sharded model are sharded."""
        plugin = None if _internal_call else getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            super().save_model(output_dir, _internal_call)
            return
        of_checkpoints = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            plugin.set_state_dict_type(of_checkpoints)

    def save_checkpoint(self) -> None:
        """Saves a checkpoint now, as the training does at its own times."""
        self._save_checkpoint(self.model, trial=None)
        self.callback_handler.on_save(self.args, self.state, self.control)

    @property
    def amid_rollouts(self) -> bool:
        """Whether rollouts that were sampled together are not all learned from yet."""
        return self._step % (self._micro_batches_per_generation * self.num_iterations) != 0

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
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            if not folder.parent.is_dir():
                raise UserError(f"{folder.parent} is gone: it was deleted or moved while the training wrote to it.")
            checkpoints.remove(folder)  # half-written, or damaged
        self.accelerator.wait_for_everyone()
        try:
            with checkpoints.rotating_later(self):
                super()._save_checkpoint(model, trial)
                checkpoints.save(folder, self)
        except (OSError, RuntimeError, SafetensorError) as error:
            checkpoints.remove(folder)
            raise UserError(f"{folder.name} could not be written: {error}{disk_space(folder.parent)}") from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is not None:  # gathered from the processes
            share_tied(state_dict, self.model)
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            finish_folder(Path(output_dir or self.args.output_dir or ""), self.card or self._own_card())

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Writes our page to the output folder, which is what is pushed to a hub."""
        if self.is_world_process_zero() and self.args.push_to_hub:
            write_card(Path(self.args.output_dir or ""), self.card or self._own_card())

    def _own_card(self) -> Card:
        """What the trainer knows by itself of the model that it trains."""
        name = self.accelerator.unwrap_model(self.model).name_or_path
        return Card("A model trained with selfdistill", base_of(name) or "made in memory")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._take_shards()
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        checkpoints.restore(Path(resume_from_checkpoint), self)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self.on_random_state_loaded()

    def _run_epoch(self, *args: Any, **how: Any) -> None:
        """transformers looks at the number of steps only after one: a resumed run may have taken all of them."""
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(*args, **how)
            return
        self._load_rng_state(how["resume_from_checkpoint"])  # as at the end of the unbroken training
        self.control.should_training_stop = True


def _weighted(rewards: Float[Tensor, "B F"], weights: Float[Tensor, " F"]) -> list[float | None]:
    """Weighted sum of the rewards that apply to each completion; None where none does."""
    rows = []
    for row in rewards.tolist():
        applicable = [w * r for w, r in zip(weights.tolist(), row, strict=True) if r == r]
        rows.append(sum(applicable) if applicable else None)
    return rows
