"""From a checked run to its parts."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from selfdistill.config.schema import Run, Target
from selfdistill.config.targets import make
from selfdistill.data import DataSplits
from selfdistill.errors import UserError
from selfdistill.evaluation.evaluator import EvalSettings, Evaluator, Scorer, load_retention
from selfdistill.models.adapter_targets import check_target_modules
from selfdistill.models.export import Exports
from selfdistill.models.loading import load_configured, lora_config
from selfdistill.rewards.adapter import name_of
from selfdistill.rewards.base import AsksPolicy, is_verifiable
from selfdistill.rewards.exact import ExactMatch
from selfdistill.rewards.mix import Mix
from selfdistill.rewards.scorer import PolicyScorer
from selfdistill.teachers import Teacher
from selfdistill.teachers.context import Demonstration
from selfdistill.teachers.server import ServerTeacher
from selfdistill.teachers.weights import Base
from selfdistill.training import unsloth
from selfdistill.training.arguments import trainer_arguments, use_cuda
from selfdistill.training.checkpoints import CHECKPOINTS
from selfdistill.training.engine import check_vllm, starting_vllm
from selfdistill.training.reward_trial import try_reward
from selfdistill.training.row_checks import answer_field, check_rows
from selfdistill.training.trainer import SelfDistillTrainer
from selfdistill.training.update_size import UpdateSize


@dataclass
class Parts:
    """A run that is ready to start.

    Attributes:
        judged_by: who judges the evaluation's answers, for the plan.
        evaluator: None without the group `eval`; so are the monitors and the exporter without theirs.
    """

    tokenizer: PreTrainedTokenizerBase
    data: DataSplits
    trainer: SelfDistillTrainer
    evaluator: Evaluator | None
    judged_by: str
    monitors: Any
    exporter: Exports | None


def build(run: Run, folder: Path, at_end: ExitStack) -> Parts:
    """Loads and connects everything; nothing is trained yet.

    Args:
        folder: the run's, for its checkpoints.
        at_end: is given what has to be closed when the run is over, also where this fails.

    Raises:
        UserError: a file, model or server that the configuration names cannot be used.
    """
    _prepare_process(run)
    # First what is cheap to build, so that a mistake in it is reported before weights load.
    reward, teacher, settings = make(run.reward, "reward"), make(run.teacher, "teacher"), make(run.eval, "eval")
    monitors, exporter = make(run.monitors, "monitors"), make(run.export, "export")
    if teacher is not None:
        at_end.callback(teacher.close)

    model, tokenizer = unsloth.load(run) if run.model.loader == "unsloth" else load_configured(asdict(run.model))
    if run.model.tuning == "lora" and not isinstance(model, PeftModel):
        check_target_modules(model, run.model.lora.target_modules)
    has_adapter = run.model.tuning == "full" or isinstance(model, PeftModel)
    data = load_data(run, tokenizer)
    if teacher is not None:
        for line in teacher.check(tokenizer, vocabulary_size=model.get_output_embeddings().weight.size(0)):
            if PartialState().is_main_process:
                print(line)
    if isinstance(teacher, ServerTeacher) and teacher.mode == "write":
        teacher, data = written_by(teacher, run, data)
    check_rows(reward, data.train, run.rollout, str(run.data.get("path", run.data["_target_"])), tokenizer)
    try_reward(reward, data.train, str(run.data.get("path", run.data["_target_"])))

    arguments = trainer_arguments(run, folder / CHECKPOINTS)
    with starting_vllm(run.hardware.vllm, cuda=not arguments.use_cpu):
        trainer = SelfDistillTrainer(
            model=model,
            reward_funcs=reward,
            args=arguments,
            teacher=teacher,
            distillation=run.distillation if teacher is not None else None,
            rollout=run.rollout,
            train_dataset=data.train,
            processing_class=tokenizer,
            peft_config=None if has_adapter else lora_config(**asdict(run.model.lora)),
        )
    trainer.add_callback(UpdateSize(trainer))
    evaluator, judged_by = _evaluator(run, settings, reward, data, trainer)
    return Parts(tokenizer, data, trainer, evaluator, judged_by, monitors, exporter)


def _prepare_process(run: Run) -> None:
    disable_progress_bar()  # loading and writing a model; the run has a bar of its own
    if run.hardware.threads:
        torch.set_num_threads(run.hardware.threads)
    check_vllm(run.hardware.vllm, cuda=use_cuda(run.hardware))  # refuses here rather than after loading


def load_data(run: Run, tokenizer: PreTrainedTokenizerBase) -> DataSplits:
    """What the group `data` gives for the student's tokenizer.

    Raises:
        UserError: a file or a row is wrong, or a loader of the user's own gives something else.
    """
    return _load("data", run.data, tokenizer)


def load_probes(run: Run, tokenizer: PreTrainedTokenizerBase) -> dict[str, DataSplits]:
    """What each of `probes` gives.

    Raises:
        UserError: as in `load_data`.
    """
    return {name: _load(f"probes.{name}", node, tokenizer) for name, node in run.probes.items()}


def _load(key: str, node: Target, tokenizer: PreTrainedTokenizerBase) -> DataSplits:
    data = make(node, key, tokenizer=tokenizer)
    if not isinstance(data, DataSplits):
        raise UserError(
            f"{key}._target_={node['_target_']} gives {type(data).__name__}: let it return selfdistill.data.DataSplits."
        )
    return data


def written_by(server: ServerTeacher, run: Run, data: DataSplits) -> tuple[Teacher | None, DataSplits]:
    """The training data with the demonstrations that a server has written, and the teacher that shows them.

    With `rollout.on_policy_fraction=0` they are the target, and nobody shows them.

    Raises:
        UserError: no demonstration was worth keeping.
    """
    rows = data.train
    columns = [{name: row[name] for name in rows.column_names if name != "prompt"} for row in rows]
    with server:
        written = server.write(rows["prompt"], golden=rows["golden_response"], columns=columns)
    rows = rows.remove_columns("golden_response").add_column("golden_response", written)
    kept = rows.filter(lambda row: bool(row["golden_response"]))
    if not len(kept):
        raise UserError(
            "teacher.mode=write: none of what the server wrote was kept; lower teacher.keep_at_least or look at its "
            "answers."
        )
    print(f"the server wrote demonstrations for {len(kept)} of {len(rows)} prompts; the others are left out")
    teacher = None if run.rollout.on_policy_fraction == 0 else Teacher(Base(), Demonstration())
    return teacher, replace(data, train=kept)


def judge(run: Run, settings: EvalSettings, reward: Any) -> tuple[Scorer, str]:
    """Who judges the task in an evaluation, and what the plan says of it.

    `eval.scorer`, where it is given; else the run's own reward, where it tells right from wrong; else exact match.
    """
    if settings.scorer is not None:
        return settings.scorer, f"{name_of(settings.scorer)} (eval.scorer)"
    own = reward.judge if isinstance(reward, Mix) else reward
    if own is not None and is_verifiable(own):
        return own, f"{name_of(own)}, as the reward"
    why = "there is no reward" if reward is None else f"{name_of(reward)} does not tell right from wrong"
    return ExactMatch(), f"exact_match, since {why} (another one: reward@eval.scorer=NAME)"


def _evaluator(
    run: Run, settings: EvalSettings | None, reward: Any, data: DataSplits, trainer: SelfDistillTrainer
) -> tuple[Evaluator | None, str]:
    """Rows without an answer, such as raw text, are left out where the scorer compares with one."""
    if settings is None:
        return None, "nothing"
    scorer, said = judge(run, settings, reward)
    tokenizer: Any = trainer.processing_class
    if isinstance(scorer, AsksPolicy):
        scorer.bind(PolicyScorer(trainer.accelerator.unwrap_model(trainer.model), tokenizer))
    compares = answer_field(scorer) is not None

    def judgeable(rows: Any) -> Iterator[Any]:
        return (row for row in rows if not compares or row["answer"] or row["golden_response"])

    merge = run.data.get("system_turn") == "merge"
    chat, limit = bool(tokenizer.chat_template), settings.max_rows_per_suite
    evaluator = Evaluator(
        settings,
        judgeable(data.eval),
        load_retention(settings.retention_path, max_rows_per_suite=limit, chat=chat, merge_system=merge),
        probes={name: judgeable(splits.eval) for name, splits in load_probes(run, tokenizer).items()},
        scorer=scorer,
        seed=run.seed,
        chat_template_kwargs=run.model.chat_template_kwargs,
    )
    return evaluator, said
