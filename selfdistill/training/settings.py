"""What can be said about a run beyond model, data, rewards and teacher: the trainer's own settings."""

from typing import no_type_check

from trl import GRPOConfig

from selfdistill.config.settings import Distillation, RolloutSource

__all__ = ["Distillation", "RolloutSource", "SelfDistillConfig"]


@no_type_check  # TRL stores other types than it annotates; the tests check annotations at run time
class SelfDistillConfig(GRPOConfig):
    """TRL's arguments; `num_generations=1` is allowed, for runs without a policy gradient."""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            # raised after everything that a run with one generation needs has been set up
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise
