"""Whether the student can be trained as it was asked for, found out once the trainer is made."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from selfdistill.errors import UserError
from selfdistill.models.agreement import (
    LogProbs,
    can_be_asked,
    check_head,
    check_log_probs,
    check_padding,
    is_told_positions,
    tell_positions,
)
from selfdistill.models.precision import check_precision
from selfdistill.models.structure import inner_model
from selfdistill.rewards.adapter import AdaptedReward
from selfdistill.rewards.base import AsksPolicy
from selfdistill.training.rollout_trainer import RolloutTrainer

if TYPE_CHECKING:
    from selfdistill.training.trainer import SelfDistillTrainer

WHOSE = "The student"
NOT_ASKED = (
    "The student was divided among the processes as it was loaded (ZeRO-3), so that what the losses compute of it "
    "could not be compared with what it says itself. Load it before the GRPOConfig is made: then each has it whole."
)
IMAGES = ("image", "images")


def check_student(trainer: "SelfDistillTrainer", student: nn.Module) -> list[str]:
    """Asks the unwrapped student about a few tokens, in each way in which the training will ask it.

    Returns:
        what could not be found out.

    Raises:
        UserError: the losses would see something else than the model's own predictions.
    """
    check_precision(student)
    _check_text(trainer)
    tokenizer = trainer._tokenizer
    asked = can_be_asked(student)
    if asked:
        check_padding(student, tokenizer, WHOSE)
        if trainer.teacher is not None or trainer.rollout.cross_entropy_weight:
            check_head(student, tokenizer, WHOSE)
        if trainer.has_policy_term and not is_deepspeed_zero3_enabled():  # there TRL wants divided weights
            check_log_probs(student, tokenizer, _trls_pass(trainer), trainer.temperature, WHOSE)
    own = [(asked, is_told_positions(student))]
    everyones = gather_object(own) if trainer.accelerator.num_processes > 1 else own
    told = any(told for _, told in everyones)
    if told and not is_told_positions(student):
        tell_positions(student)  # a process that is still to get its weights follows the others
    if told and trainer.ref_model is not None:
        tell_positions(trainer.ref_model)
    return [] if any(asked for asked, _ in everyones) else [NOT_ASKED]


def check_zero3(used: Mapping[str, bool]) -> None:
    """Refuses under ZeRO-3 what would read weights of which each process has a piece alone.

    Args:
        used: whether the run has what reads them, by the name under which it is set.

    Raises:
        UserError: one of these is used.
    """
    names = [name for name, is_used in used.items() if is_used]
    if names and is_deepspeed_zero3_enabled():
        raise UserError(
            f"{names[0]} reads the model's weights outside of its passes, and ZeRO-3 leaves each process a piece of "
            "them. Train with FSDP2 (conf/accelerate/fsdp2.yaml), data parallelism or ZeRO-2."
        )


def _trls_pass(trainer: "SelfDistillTrainer") -> LogProbs:
    """TRL's own pass as a policy gradient makes it: for a mixture of experts with its load-balancing loss."""
    balances = trainer.aux_loss_enabled

    def log_probs(*asked: Any) -> Any:
        try:
            passed = super(RolloutTrainer, trainer)._get_per_token_logps_and_entropies
            return passed(*asked, compute_aux_loss=True) if balances else passed(*asked)
        except AttributeError as error:
            if not balances:
                raise
            name = type(inner_model(trainer.model)).__name__
            raise UserError(
                f"TRL cannot compute the load-balancing loss of a {name} ({error}): write "
                "+training.arguments.router_aux_loss_coef=0, or from Python GRPOConfig(router_aux_loss_coef=0.0)."
            ) from error

    return log_probs


def _check_text(trainer: "SelfDistillTrainer") -> None:
    """Refuses images where only token ids and a mask are passed to the model."""
    found = set(IMAGES) & set(getattr(trainer.train_dataset, "column_names", None) or ())
    readers = {
        "a teacher": trainer.teacher is not None,
        "cross-entropy on demonstrations": bool(trainer.rollout.cross_entropy_weight),
        **{
            f"the reward {r.__name__}": isinstance(r.function, AsksPolicy)
            for r in trainer.rewards
            if isinstance(r, AdaptedReward)
        },
    }
    reader = next((name for name, reads in readers.items() if reads), None)
    if found and reader:
        raise UserError(
            f"The data has images (column {min(found)}), and {reader} would look at the text alone. Leave the column "
            "out, or train with rewards that need no policy."
        )
